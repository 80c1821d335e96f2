// The race detector: happens-before by vector clocks (FastTrack, Flanagan and Freund 2009), a byte at a time.
//
// Deliberately strict: only barriers, __syncwarp and warp-wide waits inside them order accesses. Shuffles, ballots and
// mma do not, as the CUDA guide says. Atomics do not race with atomics and order nothing. Blocks of one launch are
// never ordered: that two of them touch one byte, and one writes without an atomic, is a race.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace simt {

using Clock = std::vector<uint32_t>;  // of one thread: what it has seen of every thread of its block

enum class Access { read, write, atomic };

// A place in the kernel: a line, or the address of code where only that is known.
struct Where {
  const char* file = nullptr;
  int line = 0;
  const void* code = nullptr;
  std::string text() const;  // "file:line", or "module+0x12ab" for addr2line
};

// What one thread is while it accesses memory.
struct Accessor {
  uint32_t block = 0;
  int thread = 0;
  const Clock* clock = nullptr;
};

class RaceDetector {
 public:
  void begin_launch();
  void begin_block(const unsigned char* shared, size_t shared_bytes);
  void access(const Accessor& who, const void* p, size_t bytes, Access kind, const Where& where);
  // The target of an asynchronous copy: nobody may touch it until the copying thread has waited.
  void set_in_flight(const void* p, size_t bytes, int thread);
  void clear_in_flight(const void* p, size_t bytes);
  const std::vector<std::string>& reports() const { return reports_; }
  void clear_reports();

 private:
  struct Cell {
    uint32_t write_clock = 0, read_clock = 0;  // 0: never
    uint32_t write_block = 0, read_block = 0;
    int16_t write_thread = -1, read_thread = -1, flying_for = -1;
    bool atomic = false, read_by_blocks = false;
    int32_t readers = -1;  // index of a Clock of reads, when several unordered threads have read
  };
  static constexpr size_t kPage = 4096;
  struct Page {
    Cell cells[kPage];
  };

  Cell& cell(uintptr_t address);
  bool write_is_ordered(const Accessor& who, const Cell& c) const;
  bool reads_are_ordered(const Accessor& who, const Cell& c) const;
  void remember_read(const Accessor& who, Cell& c);
  void report(const char* what, const Accessor& who, uint32_t other_block, int other, uintptr_t address,
              const Where& where);

  const unsigned char* shared_ = nullptr;
  size_t shared_bytes_ = 0;
  std::vector<Cell> shared_cells_;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;  // of global memory
  uintptr_t last_page_ = ~uintptr_t{0};
  Page* last_ = nullptr;
  std::vector<Clock> reader_clocks_;
  std::vector<std::string> reports_;
  std::set<std::string> seen_;
};

}  // namespace simt
