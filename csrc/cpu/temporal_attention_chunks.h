// How the items of a temporal_attention call are shared out, and how their bias gradients are summed.
#pragma once

#include <cstring>

#include "parallel.h"
#include "temporal_attention_math.h"

FASTVDIFF_BEGIN_ISA

constexpr int64_t kMaxChunks = 64;  // partial sums of dbias per head

// An item is `positions` neighbouring positions of `heads` neighbouring heads of one sample, less at the ends. A chunk
// of them runs on one worker; chunks follow from the sizes alone.
struct Chunks {
  int64_t positions, heads;   // of an item, at most
  int64_t strips;             // items in a sample and group of heads
  int64_t groups;             // of heads
  int64_t items;              // of a group
  int64_t per_chunk, chunks;  // items in a chunk, chunks in a group
  int64_t partials;           // floats of the partial sums of dbias

  Chunks(const TemporalAttentionParams& p, int64_t positions, int64_t heads) : positions(positions), heads(heads) {
    strips = (p.positions + positions - 1) / positions;
    groups = (p.heads + heads - 1) / heads;
    items = p.batch * strips;
    per_chunk = p.dbias ? (items + kMaxChunks - 1) / kMaxChunks : 1;
    chunks = (items + per_chunk - 1) / per_chunk;
    partials = p.dbias ? chunks * p.heads * p.frames * p.keys : 0;
  }

  Place place(int64_t group, int64_t item) const {
    return {item / strips, group * heads, item % strips * positions};
  }
};

// p.dbias = the chunks' sums, in order.
inline void sum_partials(const TemporalAttentionParams& p, const Chunks& cut, const float* partials) {
  const int64_t entries = p.heads * p.frames * p.keys;
  std::memset(p.dbias, 0, entries * sizeof(float));
  for (int64_t c = 0; c < cut.chunks; ++c)
    for (int64_t i = 0; i < entries; ++i) p.dbias[i] += partials[c * entries + i];
}

// Runs every item. Worker(p, plan, scratch) has run(place, place of what it is to run next); with dbias, clear() its
// sums and sum(head of the group, t, j) of what ran since.
template <class Worker, class Plan>
void run_chunks(const TemporalAttentionParams& p, const Plan& plan) {
  const Chunks& cut = plan.cut;
  float* partials = aligned(p.workspace);
  float* scratches = partials + whole_lines(cut.partials);
  // Heads that are neighbours in memory share cache lines and pages: then they follow each other.
  const bool heads_inside = p.q.stride_h < p.q.stride_s;
  const auto group_of = [&](int64_t n) { return heads_inside ? n % cut.groups : n / cut.chunks; };
  const auto chunk_of = [&](int64_t n) { return heads_inside ? n / cut.groups : n % cut.chunks; };
  parallel_for(p.threads, cut.chunks * cut.groups, [&](int64_t begin, int64_t end, int index) {
    Worker worker(p, plan, scratches + index * plan.worker);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t group = group_of(n), chunk = chunk_of(n), first = chunk * cut.per_chunk;
      const int64_t last = first + cut.per_chunk < cut.items ? first + cut.per_chunk : cut.items;
      const int64_t after = n + 1 < end ? n + 1 : n;
      if (p.dbias) worker.clear();
      for (int64_t i = first; i + 1 < last; ++i) worker.run(cut.place(group, i), cut.place(group, i + 1));
      worker.run(cut.place(group, last - 1), cut.place(group_of(after), chunk_of(after) * cut.per_chunk));
      if (!p.dbias) continue;
      for (int64_t h = 0; h < cut.heads && group * cut.heads + h < p.heads; ++h) {
        float* partial = partials + (chunk * p.heads + group * cut.heads + h) * p.frames * p.keys;
        for (int64_t t = 0; t < p.frames; ++t)
          for (int64_t j = 0; j < p.keys; ++j) partial[t * p.keys + j] = worker.sum(h, t, j);
      }
    }
  });
  if (p.dbias) sum_partials(p, cut, partials);
}

FASTVDIFF_END_ISA
