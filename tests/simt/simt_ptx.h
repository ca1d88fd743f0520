// The host's side of csrc/cuda/ptx.h. Fragment layouts as in the PTX tables that ptx.h repeats.
#pragma once

namespace fastvdiff::cuda {

struct MmaLane {
  uint32_t a[4], b[2];
  float d[4];
};
static_assert(sizeof(MmaLane) <= simt::kSlot, "a lane's fragments fit its slot");

template <class T, bool HIGH>
float half_of(uint32_t pair) {
  return HIGH ? Pair<T>::high(pair) : Pair<T>::low(pair);
}

inline float tf32_value(uint32_t bits) { return float_from_bits(bits & 0xffffe000u); }

// The last lane computes the product of the whole warp.
template <int K, class Spread>
void multiply(simt::Slot* slots, Spread spread) {
  float a[16][K], b[K][8];
  MmaLane lanes[simt::kWarp];
  for (int i = 0; i < simt::kWarp; ++i) {
    std::memcpy(&lanes[i], slots[i], sizeof(MmaLane));
    spread(lanes[i], a, b, i / 4, i % 4);
  }
  float d[16][8] = {};
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int i = 0; i < simt::kWarp; ++i) {
    const int g = i / 4, t = i % 4;
    for (int e = 0; e < 4; ++e) lanes[i].d[e] += d[g + 8 * (e / 2)][2 * t + e % 2];
    std::memcpy(slots[i], &lanes[i], sizeof(MmaLane));
  }
}

template <class T>
void combine_16bit(simt::Slot* slots) {
  multiply<16>(slots, [](const MmaLane& own, float (&a)[16][16], float (&b)[16][8], int g, int t) {
    for (int r = 0; r < 4; ++r) {
      const int row = g + 8 * (r % 2), column = 2 * t + 8 * (r / 2);
      a[row][column] = half_of<T, false>(own.a[r]), a[row][column + 1] = half_of<T, true>(own.a[r]);
    }
    for (int r = 0; r < 2; ++r) {
      b[2 * t + 8 * r][g] = half_of<T, false>(own.b[r]), b[2 * t + 8 * r + 1][g] = half_of<T, true>(own.b[r]);
    }
  });
}

inline void combine_tf32(simt::Slot* slots) {
  multiply<8>(slots, [](const MmaLane& own, float (&a)[16][8], float (&b)[8][8], int g, int t) {
    for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][t + 4 * (r / 2)] = tf32_value(own.a[r]);
    for (int r = 0; r < 2; ++r) b[t + 4 * r][g] = tf32_value(own.b[r]);
  });
}

inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], void (*combine)(simt::Slot*),
                simt::Site site) {
  MmaLane own;
  std::memcpy(own.a, a, sizeof(a)), std::memcpy(own.b, b, sizeof(b)), std::memcpy(own.d, d, sizeof(d));
  simt::Slot* slots = simt::meet_warp(&own, sizeof(own), combine, site);
  std::memcpy(&own, slots[simt::lane()], sizeof(own));
  std::memcpy(d, own.d, sizeof(d));
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_HERE) {
  mma(d, a, b, combine_16bit<T>, {"mma_m16n8k16", file, line});
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_HERE) {
  mma(d, a, b, combine_tf32, {"mma_m16n8k8_tf32", file, line});
}

inline uint32_t to_tf32(float x) {
  const uint32_t bits = float_bits(x);
  return std::isfinite(x) ? (bits + 0x1000u) & 0xffffe000u : bits;
}

// Each lane brings its row's address; after the meeting it reads its own elements through the addresses.
template <int N>
void ldmatrix_host(uint32_t (&r)[N], const void* row, bool transposed, simt::Site site) {
  if (simt::lane() < 8 * N) {
    simt::check_aligned(row, 16, site);
    simt::note_read(row, 16);
  }
  simt::Slot* slots = simt::meet_warp(
      &row, sizeof(row),
      [](simt::Slot* all) {  // the rows themselves, while no lane can change them
        for (int i = 0; i < 8 * N; ++i) {
          const void* from;
          std::memcpy(&from, all[i], sizeof(from));
          std::memcpy(all[i], from, 16);
        }
      },
      site);
  const int g = simt::lane() / 4, t = simt::lane() % 4;
  for (int i = 0; i < N; ++i) {
    uint16_t low, high;
    const unsigned char* first = slots[8 * i + (transposed ? 2 * t : g)];
    const unsigned char* second = slots[8 * i + (transposed ? 2 * t + 1 : g)];
    std::memcpy(&low, first + 2 * (transposed ? g : 2 * t), 2);
    std::memcpy(&high, second + 2 * (transposed ? g : 2 * t + 1), 2);
    r[i] = low | static_cast<uint32_t>(high) << 16;
  }
}

template <int N>
void ldmatrix(uint32_t (&r)[N], const void* row, SIMT_HERE) {
  ldmatrix_host(r, row, false, {"ldmatrix", file, line});
}
template <int N>
void ldmatrix_transposed(uint32_t (&r)[N], const void* row, SIMT_HERE) {
  ldmatrix_host(r, row, true, {"ldmatrix_transposed", file, line});
}

template <int BYTES>
void cp_async(void* shared, const void* global, int valid = BYTES, SIMT_HERE) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  simt::async_copy(shared, global, BYTES, valid, {"cp_async", file, line});
}
inline void cp_async_commit() { simt::async_commit(); }
template <int PENDING>
void cp_async_wait() {
  simt::async_wait(PENDING);
}

inline uint4 load_128(const void* global, SIMT_HERE) {
  simt::check_aligned(global, 16, {"load_128", file, line});
  simt::note_read(global, 16);
  uint4 value;
  std::memcpy(&value, global, 16);
  return value;
}
inline uint4 load_128_last(const void* global, SIMT_HERE) { return load_128(global, file, line); }
inline void store_128(void* global, uint4 value, SIMT_HERE) {
  simt::check_aligned(global, 16, {"store_128", file, line});
  simt::note_write(global, 16);
  std::memcpy(global, &value, 16);
}

}  // namespace fastvdiff::cuda
