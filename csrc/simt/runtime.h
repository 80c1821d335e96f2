// What a test sees of the runtime: how to run, and what was found.
//
//   simt::options() = {simt::Order::random, 7, true};
//   launch_my_kernel(...);                       // throws simt::Error on a deadlock, divergence, misalignment
//   const simt::Findings found = simt::take_findings();
//   // found.races must be empty
#pragma once
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {

// A kernel did what no card would survive; the message names the block, the threads and the source lines.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { forward, reverse, random };  // in which the ready threads of a block run

struct Options {
  Order order = Order::forward;
  uint32_t seed = 1;
  // Follow every access. Needs kernels compiled with -fsanitize=thread and linked without libtsan.
  bool races = false;
  // If not empty, every launch throws an Error with these words: what a card that refuses one looks like to its caller.
  std::string refusal;
};

// Shared-memory transactions of one source line: `phases` are those needed without conflicts, `extra` what bank
// conflicts add.
struct BankCount {
  int64_t phases = 0, extra = 0;
};

struct Findings {
  std::vector<std::string> races;             // each kind and place once
  std::map<std::string, BankCount> ldmatrix;  // by file:line
  std::map<std::string, BankCount> shared;  // by file:line of cp.async, by code address of plain accesses (races only)
  int64_t accesses = 0;                     // followed by the race detector: 0 means that the hooks are missing
};

Options& options();        // of this OS thread
Findings take_findings();  // since the last call

}  // namespace simt
