// Warp collectives: the last lane of the mask to arrive does the work of all.
#include <algorithm>
#include <cstring>

#include "simt/block.h"
#include "simt/types.h"

namespace simt {

namespace {

std::string named(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

template <class T>
T& arguments(Thread* lane) {
  return *static_cast<T*>(lane->arguments);
}

void reduce_or(Thread* const* lanes, uint32_t mask) {
  uint32_t all = 0;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) all |= arguments<ReduceArgs>(lanes[i]).in;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) arguments<ReduceArgs>(lanes[i]).out = all;
}

float element_of(uint32_t pair, int which) { return which ? high_bf16(pair) : low_bf16(pair); }

void mma(Thread* const* lanes) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const MmaArgs& args = arguments<MmaArgs>(lanes[lane]);
    const int g = lane >> 2, t = lane & 3;
    for (int h = 0; h < 2; h++) {
      for (int r = 0; r < 4; r++) a[g + 8 * (r & 1)][2 * t + 8 * (r >> 1) + h] = element_of(args.a[r], h);
      for (int r = 0; r < 2; r++) b[2 * t + 8 * r + h][g] = element_of(args.b[r], h);
    }
  }
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 8; j++) {
      float sum = 0.0f;
      for (int k = 0; k < 16; k++) sum += a[i][k] * b[k][j];
      d[i][j] = sum;
    }
  for (int lane = 0; lane < 32; lane++) {
    const MmaArgs& args = arguments<MmaArgs>(lanes[lane]);
    const int g = lane >> 2, t = lane & 3;
    for (int e = 0; e < 4; e++) args.d[e] += d[g + 8 * (e >> 1)][2 * t + (e & 1)];
  }
}

}  // namespace

void Machine::warp_collective(WarpOp op, uint32_t mask, void* arguments, Site site) {
  Thread& me = *running_;
  if (!(mask >> (me.index & 31) & 1)) fail("is not in the mask that it gives at " + named(site));
  me.op = op;
  me.mask = mask;
  me.arguments = arguments;
  me.site = site;
  me.state = State::in_warp_op;
  Thread* lanes[32] = {};
  const size_t first = static_cast<size_t>(me.index) & ~size_t{31};
  for (size_t i = 0; i < 32; i++) {
    if (!(mask >> i & 1)) continue;
    if (first + i >= threads_.size()) fail("names lanes at " + named(site) + " that the block does not have");
    lanes[i] = &threads_[first + i];
    if (lanes[i]->state == State::ended) fail("waits at " + named(site) + " for a lane that has ended");
    const bool here =
        lanes[i]->state == State::in_warp_op && lanes[i]->op == op && lanes[i]->mask == mask && lanes[i]->site == site;
    if (!here) return yield();  // a later lane does the work
  }
  for (Thread* lane : lanes)
    if (lane) lane->state = State::ready, lane->epoch += mask == ~0u;
  run_collective(lanes, op, mask);
}

void Machine::run_collective(Thread* const* lanes, WarpOp op, uint32_t mask) {
  switch (op) {
    case WarpOp::shuffle:
      return shuffle(lanes, mask);
    case WarpOp::reduce_or:
      return reduce_or(lanes, mask);
    case WarpOp::mma:
      return mma(lanes);
    case WarpOp::ldmatrix:
      return ldmatrix(lanes, false);
    case WarpOp::ldmatrix_trans:
      return ldmatrix(lanes, true);
    case WarpOp::sync: {
      std::vector<Thread*> together;
      for (int i = 0; i < 32; i++)
        if (lanes[i]) together.push_back(lanes[i]);
      return order(together);
    }
  }
}

void Machine::shuffle(Thread* const* lanes, uint32_t mask) {
  for (int i = 0; i < 32; i++) {
    if (!lanes[i]) continue;
    ShuffleArgs& args = arguments<ShuffleArgs>(lanes[i]);
    const int source = args.source & 31;
    if (!(mask >> source & 1))
      fail("lane " + std::to_string(i) + " shuffles from lane " + std::to_string(source) +
           ", which is not in the mask, at " + named(lanes[i]->site));
    args.out = arguments<ShuffleArgs>(lanes[source]).in;
  }
}

void Machine::ldmatrix(Thread* const* lanes, bool transposed) {
  uint16_t rows[32][8];
  std::vector<LaneAccess> addresses;
  for (int i = 0; i < 32; i++) {
    const void* row = arguments<LdmatrixArgs>(lanes[i]).row;
    const auto* byte = static_cast<const unsigned char*>(row);
    if (reinterpret_cast<uintptr_t>(row) % 16)
      fail("ldmatrix row of lane " + std::to_string(i) + " is not aligned to 16 bytes at " + named(lanes[i]->site));
    if (byte < shared_ || byte + 16 > shared_ + shared_bytes_)
      fail("ldmatrix row of lane " + std::to_string(i) + " lies outside shared memory at " + named(lanes[i]->site));
    if (options.races) {
      findings.accesses++;
      detector_.access({block_number_, lanes[i]->index, &lanes[i]->clock}, row, 16, Access::read,
                       {lanes[i]->site.file, lanes[i]->site.line, nullptr});
    }
    memcpy(rows[i], row, 16);
    addresses.push_back({i, reinterpret_cast<uintptr_t>(row) - reinterpret_cast<uintptr_t>(shared_), 16});
  }
  const BankCount banks = bank_conflicts(addresses);
  BankCount& total = findings.ldmatrix[named(lanes[0]->site)];
  total.phases += banks.phases;
  total.extra += banks.extra;
  for (int i = 0; i < 32; i++) {
    uint32_t* out = arguments<LdmatrixArgs>(lanes[i]).out;
    const int r = i >> 2, c = (i & 3) * 2;
    for (int m = 0; m < 4; m++) {
      const uint32_t low = transposed ? rows[m * 8 + c][r] : rows[m * 8 + r][c];
      const uint32_t high = transposed ? rows[m * 8 + c + 1][r] : rows[m * 8 + r][c + 1];
      out[m] = high << 16 | low;
    }
  }
}

}  // namespace simt
