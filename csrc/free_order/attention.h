// Attention over the paged cache whose softmax runs on from chunk to chunk, and whose keys are cut as suits the number
// of threads and the batch. For benchmarks/bench_invariance.py only: see cpu/attention_run.h for what the order is in
// every normal build, and why.
#pragma once
#include "cpu/attention_run.h"

#ifdef PAGELENS_ISA_AVX512_BF16
namespace pagelens::PAGELENS_ISA {

template <class Cache>
struct FreeAttention : Attention16<Cache> {
  using Base = Attention16<Cache>;
  using T = typename Base::T;
  using Group = typename Base::Group;
  using Results = typename Base::Results;
  using Base::a, Base::dim, Base::group, Base::words;

  // Scores become weights relative to the largest score so far; what was summed before is scaled when that grows.
  void weigh_rows(float* p, int64_t rows, const int64_t* seen, const float* const* value_scales,
                  const Results& all) const {
    for (int64_t r = 0; r < rows; r++) {
      if (seen[r] == 0) continue;
      const float before = all.largest[r];
      float added, *o = all.o + r * dim;
      Cache::weigh(p + r * kChunk, seen[r], value_scales, all.largest + r, &added);
      if (all.largest[r] != before && all.sum[r] != 0.0f) {
        const float factor = exp_negative(before - all.largest[r]);
        for (int64_t i = 0; i < dim; i += W) store(o + i, load(o + i) * factor);
        all.sum[r] *= factor;
      }
      all.sum[r] += added;
    }
  }

  void clear(int64_t rows, const Results& all) const {
    std::memset(all.o, 0, static_cast<size_t>(rows * dim) * 4);
    for (int64_t r = 0; r < rows; r++) all.largest[r] = -__builtin_inff(), all.sum[r] = 0.0f;
  }

  // ---- many rows; the scratch is that of Base::run_tile
  void run_tile(int64_t s, int64_t first, int64_t count, int64_t head, float* scratch) const {
    const int64_t rows = count * group, last = this->position(s, first + count - 1);
    const auto take = [&](int64_t floats) { return std::exchange(scratch, scratch + floats); };
    T* copied = reinterpret_cast<T*>(take(this->copied_bytes(dim) / 4));
    uint32_t* q = reinterpret_cast<uint32_t*>(take(rows * words));
    const Results all{take(rows * dim), take(rows), take(rows)};
    float* p = take(Base::kStepRows * kChunk);
    for (int64_t r = 0; r < rows; r++)
      Cache::load_query(this->query(s, first + r / group, head * group + r % group), dim, q + r * words);
    clear(rows, all);
    for (int64_t chunk = 0; chunk <= last; chunk += kChunk) {
      Group groups[kChunkGroups];
      const float* value_scales[kChunkGroups] = {};
      this->find_groups(s, chunk, std::min(last - chunk + 1, kChunk), head, copied, groups);
      for (int64_t g = 0; g < kChunkGroups && chunk + g * kGroup <= last; g++) value_scales[g] = groups[g].value_scales;
      const auto seen_by = [&](int64_t r) {
        return std::clamp<int64_t>(this->position(s, first + r / group) - chunk + 1, 0, kChunk);
      };
      int64_t row = 0;
      while (row < rows && seen_by(row) == 0) row++;
      for (; row < rows; row += Base::kStepRows) {
        const int64_t n = std::min(rows - row, Base::kStepRows);
        int64_t seen[Base::kStepRows];
        for (int64_t r = 0; r < n; r++) seen[r] = seen_by(row + r);
        for (int64_t g = 0; g * kGroup < seen[n - 1]; g++)
          this->score_rows(q + row * words, n, groups[g], p + g * kGroup);
        weigh_rows(p, n, seen, value_scales, {all.o + row * dim, all.largest + row, all.sum + row});
        for (int64_t g = 0; g * kGroup < seen[n - 1]; g++)
          this->add_group(p, n, g, groups[g].values, seen, all.o + row * dim);
      }
    }
    for (int64_t r = 0; r < rows; r++)
      this->put_row(s, first + r / group, head * group + r % group, all.o + r * dim, all.sum[r]);
  }

  // ---- few rows; the scratch is that of Base::run_part
  // Keys begin..end of a sequence for its query rows of all heads, [heads][queries].
  void run_range(int64_t s, int64_t begin, int64_t end, float* scratch, const Results& all) const {
    const int64_t n = this->queries(s), each = group * n, rows = a.num_heads * n;
    const auto take = [&](int64_t floats) { return std::exchange(scratch, scratch + floats); };
    T* copied = reinterpret_cast<T*>(take(this->in_place() ? 0 : a.num_kv_heads * this->copied_bytes(dim) / 4));
    int64_t* seen = reinterpret_cast<int64_t*>(take(2 * rows));
    float* p = take(rows * kChunk);
    uint32_t* q = reinterpret_cast<uint32_t*>(take(rows * words));
    for (int64_t r = 0; r < rows; r++) Cache::load_query(this->query(s, r % n, r / n), dim, q + r * words);
    clear(rows, all);
    for (int64_t at = begin; at < end; at += kChunk) {
      const typename Base::Part part{s, at, 0, a.num_kv_heads};
      const int64_t count = std::min(end - at, kChunk);
      for (int64_t r = 0; r < rows; r++) seen[r] = std::clamp<int64_t>(this->position(s, r % n) - at + 1, 0, count);
      if (!this->in_place())
        for (int64_t h = 0; h < a.num_kv_heads; h++)
          this->copy_chunk(s, at, count, h, copied + h * this->copied_elements());
      this->each_group(part, count, copied, [&](int64_t h, int64_t g, const Group& keys) {
        this->score_rows(q + h * each * words, each, keys, p + h * each * kChunk + g * kGroup);
      });
      for (int64_t h = 0; h < a.num_kv_heads; h++) {
        const float* value_scales[kChunkGroups] = {};
        if (a.value_scales)
          this->each_group({s, at, h, 1}, count, copied + h * this->copied_elements(),
                           [&](int64_t, int64_t g, const Group& keys) { value_scales[g] = keys.value_scales; });
        const int64_t row = h * each;
        weigh_rows(p + row * kChunk, each, seen + row, value_scales,
                   {all.o + row * dim, all.largest + row, all.sum + row});
      }
      this->each_group(part, count, copied, [&](int64_t h, int64_t g, const Group& keys) {
        this->add_group(p + h * each * kChunk, each, g, keys.values, seen, all.o + h * each * dim);
      });
    }
  }

  void put_rows(int64_t s, const Results& all) const {
    const int64_t n = this->queries(s);
    for (int64_t r = 0; r < a.num_heads * n; r++) this->put_row(s, r % n, r / n, all.o + r * dim, all.sum[r]);
  }

  // Query row r of a sequence from what `slots` ranges of its keys gave, `stride` floats apart.
  void merge_slots(int64_t s, int64_t r, const float* slot, int64_t slots, int64_t stride, float* o) const {
    const int64_t n = this->queries(s);
    std::memset(o, 0, static_cast<size_t>(dim) * 4);
    float largest = -__builtin_inff(), sum = 0.0f;
    for (int64_t i = 0; i < slots; i++, slot += stride) {
      const Results part = this->results(const_cast<float*>(slot), n * a.num_heads);
      if (part.sum[r] != 0.0f) merge_chunk(part.o + r * dim, part.largest[r], part.sum[r], dim, o, &largest, &sum);
    }
    this->put_row(s, r % n, r / n, o, sum);
  }
};

// Items of a thread for so many groups of keys: more for it to give away to a faster thread, fewer to merge.
PAGELENS_INLINE int64_t items_a_thread(int64_t groups_a_thread) {
  return std::clamp<int64_t>(groups_a_thread / (2 * kChunkGroups), 2, 4);
}

// Sequences with few query rows, all together: an item is one run of keys, of as many groups as any other. What it
// found of a sequence lies in a slot; where one item has all keys of a sequence, it writes the results itself.
template <class Cache>
void run_few_free(ThreadPool& pool, const FreeAttention<Cache>& attention) {
  const AttentionArgs& a = attention.a;
  // Of each sequence: groups of keys, result floats and query rows before it.
  int64_t* before = pool.shared<int64_t>(1, 3 * (a.num_sequences + 1));
  const auto queries = [&](int64_t s) {
    return attention.queries(s) <= kFewQueries ? attention.queries(s) : int64_t{0};
  };
  before[0] = before[1] = before[2] = 0;
  int64_t most_rows = 0;
  for (int64_t s = 0; s < a.num_sequences; s++) {
    before[3 * s + 3] = before[3 * s] + (queries(s) ? groups_of(a, s, 0) : 0);
    most_rows = std::max(most_rows, queries(s) * a.num_heads);
  }
  const int64_t work = before[3 * a.num_sequences];
  if (work == 0) return;
  const int64_t threads = pool.num_threads();
  const int64_t items = threads == 1 ? 1 : std::min(threads * items_a_thread(work / threads), work);
  const auto item_of = [&](int64_t at) { return ((at + 1) * items - 1) / work; };  // work * i / items <= at: the last i
  const auto slots_of = [&](int64_t s) { return item_of(before[3 * s + 3] - 1) - item_of(before[3 * s]) + 1; };
  const auto stride_of = [&](int64_t s) { return queries(s) * a.num_heads * attention.result_floats(a.head_dim); };
  for (int64_t s = 0; s < a.num_sequences; s++) {
    const int64_t slots = queries(s) ? slots_of(s) : 0;
    before[3 * s + 4] = before[3 * s + 1] + slots * stride_of(s);
    before[3 * s + 5] = before[3 * s + 2] + (slots > 1 ? queries(s) * a.num_heads : 0);
  }
  const int64_t* total = before + 3 * a.num_sequences;
  float* results = pool.shared<float>(2, total[1]);
  pool.reserve_local(static_cast<size_t>(attention.part_floats(most_rows)) * 4);
  pool.run(items, [&](int64_t item, int thread) {
    const int64_t end = work * (item + 1) / items;
    for (int64_t at = work * item / items; at < end;) {
      const int64_t s = sequence_of(before, 3, a.num_sequences, at), stop = std::min(end, before[3 * s + 3]);
      const int64_t keys = std::min<int64_t>((stop - before[3 * s]) * kGroup, a.context_lens[s]);
      float* slot = results + before[3 * s + 1] + (item - item_of(before[3 * s])) * stride_of(s);
      const auto all = attention.results(slot, queries(s) * a.num_heads);
      attention.run_range(s, (at - before[3 * s]) * kGroup, keys, static_cast<float*>(pool.local(thread)), all);
      if (slots_of(s) == 1) attention.put_rows(s, all);
      at = stop;
    }
  });
  for_rows(pool, total[2], items * a.head_dim, [&](int64_t i) {
    const int64_t s = sequence_of(before + 2, 3, a.num_sequences, i);
    float o[kMaxFastDim];
    attention.merge_slots(s, i - before[3 * s + 2], results + before[3 * s + 1], slots_of(s), stride_of(s), o);
  });
}

template <class Cache>
void run_free(ThreadPool& pool, const AttentionArgs& a) {
  const FreeAttention<Cache> attention{{a}};
  run_many(pool, attention);
  run_few_free(pool, attention);
}

}  // namespace pagelens::PAGELENS_ISA
#endif
