#include "simt/race.h"

#include <dlfcn.h>

#include <cstdio>

namespace simt {

std::string Where::text() const {
  char text[300];
  Dl_info info;
  if (file) {
    std::snprintf(text, sizeof text, "%s:%d", file, line);
  } else if (dladdr(code, &info) && info.dli_fname) {
    std::snprintf(text, sizeof text, "%s+0x%zx", info.dli_fname,
                  static_cast<size_t>(static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase)));
  } else {
    std::snprintf(text, sizeof text, "%p", code);
  }
  return text;
}

void RaceDetector::begin_launch() {
  pages_.clear();
  last_page_ = ~uintptr_t{0};
  last_ = nullptr;
  reader_clocks_.clear();
}

void RaceDetector::begin_block(const unsigned char* shared, size_t shared_bytes) {
  shared_ = shared;
  shared_bytes_ = shared_bytes;
  shared_cells_.assign(shared_bytes, Cell());
}

void RaceDetector::clear_reports() {
  reports_.clear();
  seen_.clear();
}

RaceDetector::Cell& RaceDetector::cell(uintptr_t address) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(shared_);
  if (address >= first && address < first + shared_bytes_) return shared_cells_[address - first];
  const uintptr_t page = address / kPage;
  if (page != last_page_) {
    std::unique_ptr<Page>& slot = pages_[page];
    if (!slot) slot = std::make_unique<Page>();
    last_page_ = page;
    last_ = slot.get();
  }
  return last_->cells[address % kPage];
}

bool RaceDetector::write_is_ordered(const Accessor& who, const Cell& c) const {
  if (!c.write_clock) return true;
  return c.write_block == who.block && c.write_clock <= (*who.clock)[c.write_thread];
}

bool RaceDetector::reads_are_ordered(const Accessor& who, const Cell& c) const {
  if (!c.read_clock) return true;
  if (c.read_by_blocks || c.read_block != who.block) return false;
  if (c.readers < 0) return c.read_clock <= (*who.clock)[c.read_thread];
  const Clock& readers = reader_clocks_[c.readers];
  for (size_t t = 0; t < readers.size(); t++)
    if (readers[t] > (*who.clock)[t]) return false;
  return true;
}

void RaceDetector::remember_read(const Accessor& who, Cell& c) {
  const uint32_t now = (*who.clock)[who.thread];
  if (c.read_clock && c.read_block != who.block) c.read_by_blocks = true, c.readers = -1;
  if (c.readers >= 0) {
    reader_clocks_[c.readers][who.thread] = now;
  } else if (c.read_clock && c.read_block == who.block && c.read_thread != who.thread &&
             c.read_clock > (*who.clock)[c.read_thread]) {  // two reads that nothing orders: keep both
    c.readers = static_cast<int32_t>(reader_clocks_.size());
    reader_clocks_.emplace_back(who.clock->size(), 0u);
    reader_clocks_.back()[c.read_thread] = c.read_clock;
    reader_clocks_.back()[who.thread] = now;
  }
  c.read_block = who.block;
  c.read_thread = static_cast<int16_t>(who.thread);
  c.read_clock = now;
}

void RaceDetector::access(const Accessor& who, const void* p, size_t bytes, Access kind, const Where& where) {
  const auto first = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t a = first; a < first + bytes; a++) {
    Cell& c = cell(a);
    if (c.flying_for >= 0)
      return report(
          kind == Access::read ? "read of a cp.async target in flight" : "write to a cp.async target in flight", who,
          who.block, c.flying_for, a, where);
    if (!(kind == Access::atomic && c.atomic) && !write_is_ordered(who, c))
      return report(kind == Access::read ? "read after write" : "write after write", who, c.write_block, c.write_thread,
                    a, where);
    if (kind == Access::read) {
      remember_read(who, c);
      continue;
    }
    if (!reads_are_ordered(who, c)) return report("write after read", who, c.read_block, c.read_thread, a, where);
    c.write_block = who.block;
    c.write_thread = static_cast<int16_t>(who.thread);
    c.write_clock = (*who.clock)[who.thread];
    c.atomic = kind == Access::atomic;
    c.read_clock = 0;
    c.read_by_blocks = false;
    c.readers = -1;
  }
}

void RaceDetector::set_in_flight(const void* p, size_t bytes, int thread) {
  for (size_t i = 0; i < bytes; i++) cell(reinterpret_cast<uintptr_t>(p) + i).flying_for = static_cast<int16_t>(thread);
}

void RaceDetector::clear_in_flight(const void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) cell(reinterpret_cast<uintptr_t>(p) + i).flying_for = -1;
}

void RaceDetector::report(const char* what, const Accessor& who, uint32_t other_block, int other, uintptr_t address,
                          const Where& where) {
  const std::string place = where.text();
  const bool shared = address - reinterpret_cast<uintptr_t>(shared_) < shared_bytes_;
  if (!seen_.insert(std::string(what) + (shared ? " shared " : " global ") + place).second) return;
  char text[300];
  if (shared)
    std::snprintf(text, sizeof text, "%s at shared memory + %zu: thread %d and thread %d of block %u, at %s", what,
                  static_cast<size_t>(address - reinterpret_cast<uintptr_t>(shared_)), who.thread, other, who.block,
                  place.c_str());
  else
    std::snprintf(text, sizeof text, "%s in global memory: thread %d of block %u and thread %d of block %u, at %s",
                  what, who.thread, who.block, other, other_block, place.c_str());
  reports_.emplace_back(text);
}

}  // namespace simt
