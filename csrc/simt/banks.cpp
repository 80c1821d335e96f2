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

// Instruction, epoch, accesses by common instructions in it before, executions since the last of them.
using Moment = std::tuple<PlaceKey, int, int, int>;
using Between = std::pair<PlaceKey, int>;  // an instruction between two collectives of the warp

// The accesses of a warp by the instruction execution that they are part of.
//
// Threads run one by one, so what ran together must be found. What lies between the same two collectives of the whole
// warp does. Within such an epoch, instructions that all lanes executed equally often are taken to have run together
// each time, and they date the others: those under a condition, whose n-th executions in two lanes may lie in different
// rounds of a loop. Where neither a collective nor an access of all lanes separates the rounds, executions alone are
// counted, and too much or too little may be found.
std::map<Moment, std::vector<LaneAccess>> join_lanes(const std::vector<Thread*>& lanes) {
  std::map<Between, std::vector<int>> executions;
  for (size_t i = 0; i < lanes.size(); i++)
    for (const SharedAccess& a : lanes[i]->shared_accesses) {
      std::vector<int>& counts = executions[{a.instruction, a.epoch}];
      counts.resize(lanes.size());
      counts[i]++;
    }
  std::set<Between> common;
  for (const auto& [instruction, counts] : executions)
    if (std::count(counts.begin(), counts.end(), counts[0]) == static_cast<int64_t>(counts.size()))
      common.insert(instruction);

  std::map<Moment, std::vector<LaneAccess>> together;
  for (const Thread* thread : lanes) {
    std::map<Between, int> own;    // executions of common instructions
    std::map<Between, int> since;  // of others, since the last common one
    int before = 0, epoch = 0;
    for (const SharedAccess& a : thread->shared_accesses) {
      if (a.epoch != epoch) epoch = a.epoch, before = 0, since.clear();
      const bool dates = common.count({a.instruction, a.epoch}) != 0;
      const Moment moment = dates ? Moment{a.instruction, a.epoch, -1, own[{a.instruction, a.epoch}]++}
                                  : Moment{a.instruction, a.epoch, before, since[{a.instruction, a.epoch}]++};
      together[moment].push_back({thread->index % 32, a.address, a.bytes});
      if (dates) before++, since.clear();
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
