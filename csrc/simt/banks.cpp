// Bank conflicts of shared memory: which accesses of a warp are one instruction, and what the banks make of them.
#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "simt/block.h"

namespace simt {

// 32 banks of 4 bytes; lanes are served 128 bytes at a time: 32 lanes of up to 4 bytes, 16 of 8, 8 of 16. Lanes that
// touch the same word share it.
BankCount bank_conflicts(const std::vector<LaneAccess>& lanes) {
  BankCount count;
  std::map<int, std::set<uintptr_t>> words_of_phase;
  for (const LaneAccess& a : lanes)
    for (uintptr_t w = a.address / 4; w <= (a.address + a.bytes - 1) / 4; w++)
      words_of_phase[a.lane / (32 / std::max(1, a.bytes / 4))].insert(w);
  for (const auto& [phase, words] : words_of_phase) {
    int used[32] = {}, largest = 1;
    for (const uintptr_t w : words) largest = std::max(largest, ++used[w % 32]);
    count.phases++;
    count.extra += largest - 1;
  }
  return count;
}

void Machine::count_banks(Thread& thread, const void* p, size_t bytes, const Where& where) {
  const PlaceKey key = where.code ? PlaceKey{where.code, 0} : PlaceKey{where.file, where.line};
  places_.emplace(key, where);
  const uintptr_t address = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(shared_);
  thread.shared_accesses.push_back({key, address, static_cast<int>(bytes), thread.epoch});
}

namespace {

using Moment = std::tuple<PlaceKey, int, int>;  // an instruction, an epoch, its executions in it before

// The accesses of a warp by the instruction execution that they are part of.
//
// Threads run one by one, so what ran together must be found. What lies between the same two collectives of the whole
// warp (or calls of next_round) does; within such an epoch the n-th executions of an instruction are taken to. For one
// under a condition in a loop that can be wrong: next_round tells the rounds apart.
std::map<Moment, std::vector<LaneAccess>> join_lanes(const std::vector<Thread*>& lanes) {
  std::map<Moment, std::vector<LaneAccess>> together;
  for (const Thread* thread : lanes) {
    std::map<PlaceKey, int> executions;
    int epoch = 0;
    for (const SharedAccess& a : thread->shared_accesses) {
      if (a.epoch != epoch) epoch = a.epoch, executions.clear();
      together[{a.instruction, epoch, executions[a.instruction]++}].push_back({thread->index % 32, a.address, a.bytes});
    }
  }
  return together;
}

}  // namespace

void Machine::add_up_banks() {
  for (size_t first = 0; first < threads_.size(); first += 32) {
    std::vector<Thread*> lanes;
    for (size_t t = first; t < std::min(first + 32, threads_.size()); t++) lanes.push_back(&threads_[t]);
    for (const auto& [moment, accesses] : join_lanes(lanes)) {
      const BankCount banks = bank_conflicts(accesses);
      BankCount& total = findings.shared[places_[std::get<0>(moment)].text()];
      total.phases += banks.phases;
      total.extra += banks.extra;
    }
  }
  places_.clear();
}

}  // namespace simt
