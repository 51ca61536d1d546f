// Dense products, included beside loops_body.h once per vector width: SINGER_BYTES wide, tiles of
// SINGER_ROWS rows. torch's library is not asked: on processors of some makers it leaves half of
// the width unused, and its products can't end where the next loop begins.

template <typename T>
struct Product {
  typedef T Vector __attribute__((vector_size(SINGER_BYTES)));
  static constexpr int64_t kLanes = SINGER_BYTES / sizeof(T);
  static constexpr int64_t kRows = SINGER_ROWS, kColumns = 2 * kLanes;
  static_assert(kRunRows % kColumns == 0, "a run of rows ends where a block does");
  // Of the right factor, so many rows of a tile's columns stay in the first cache.
  static constexpr int64_t kDepth = 256;

  // The right factor [rows, columns] as blocks of kColumns columns, row by row, `block_stride` apart.
  // Beyond the last column its vector is filled with zeros; another vector, of which a product takes
  // nothing, is not written.
  static void pack(const T* in, int64_t row_stride, int64_t column_stride, int64_t rows,
                   int64_t columns, T* out, int64_t block_stride) {
    for (int64_t first = 0; first < columns; first += kColumns) {
      const int64_t count = columns - first < kColumns ? columns - first : kColumns;
      T* to = out + first / kColumns * block_stride;
      const T* from = in + first * column_stride;
      if (count < kColumns && count != kLanes) {
        const int64_t last = count / kLanes * kLanes;
        for (int64_t k = 0; k < rows; ++k) store(Vector{}, to + k * kColumns + last);
      }
      if (column_stride == 1) {
        for (int64_t k = 0; k < rows; ++k) {
          for (int64_t j = 0; j < count; ++j) to[k * kColumns + j] = from[k * row_stride + j];
        }
        continue;
      }
      for (int64_t start = 0; start < rows; start += kDepth) {
        const int64_t stop = start + kDepth < rows ? start + kDepth : rows;
        int64_t j = 0;
        for (; row_stride == 1 && j + 4 <= count; j += 4) {
          int64_t k = start;
          for (; k + 4 <= stop; k += 4) {
            turn(from + j * column_stride + k, column_stride, to + k * kColumns + j);
          }
          for (; k < stop; ++k) {
            for (int64_t i = j; i < j + 4; ++i) to[k * kColumns + i] = from[i * column_stride + k];
          }
        }
        for (; j < count; ++j) {
          const T* column = from + j * column_stride;
          for (int64_t k = start; k < stop; ++k) to[k * kColumns + j] = column[k * row_stride];
        }
      }
    }
  }

  // The transpose of a square of four rows, kColumns apart.
  static void turn(const T* in, int64_t stride, T* out) {
    typedef T Four __attribute__((vector_size(4 * sizeof(T))));
    Four rows[4], halves[4];
    for (int i = 0; i < 4; ++i) __builtin_memcpy(&rows[i], in + i * stride, sizeof(Four));
    for (int i = 0; i < 2; ++i) {
      const Four &above = rows[2 * i], &below = rows[2 * i + 1];
      halves[2 * i] = SINGER_SHUFFLE(above, below, 0, 4, 2, 6);
      halves[2 * i + 1] = SINGER_SHUFFLE(above, below, 1, 5, 3, 7);
    }
    for (int i = 0; i < 2; ++i) {
      const Four left = SINGER_SHUFFLE(halves[i], halves[i + 2], 0, 1, 4, 5);
      const Four right = SINGER_SHUFFLE(halves[i], halves[i + 2], 2, 3, 6, 7);
      __builtin_memcpy(out + i * kColumns, &left, sizeof(Four));
      __builtin_memcpy(out + (i + 2) * kColumns, &right, sizeof(Four));
    }
  }

  static Vector load(const T* from) {
    Vector vector;
    __builtin_memcpy(&vector, from, sizeof(vector));
    return vector;
  }

  static void store(Vector vector, T* to) { __builtin_memcpy(to, &vector, sizeof(vector)); }

  // out = factor a b, or out += it, of kCount rows and kVectors vectors of a block's columns, or
  // fewer columns. With kIsTurned a row's numbers lie `stride` apart and the rows side by side; else
  // the other way round.
  template <int kCount, bool kIsTurned, int kVectors>
  static void tile(const T* a, int64_t stride, int64_t depth, const T* b, int64_t columns,
                   bool adds, T factor, T* out, int64_t out_stride) {
    constexpr int64_t kWidth = kVectors * kLanes;
    Vector sums[kCount][kVectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
      Vector right[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * kColumns + v * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) {
        const T value = kIsTurned ? a[i + k * stride] : a[i * stride + k];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[i][v] += value * right[v];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      T* row = out + i * out_stride;
      if (columns == kWidth) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          Vector result = factor * sums[i][v];
          if (adds) result += load(row + v * kLanes);
          store(result, row + v * kLanes);
        }
        continue;
      }
      T values[kWidth];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) store(sums[i][v], values + v * kLanes);
      for (int64_t j = 0; j < columns; ++j) row[j] = factor * values[j] + (adds ? row[j] : T(0));
    }
  }

  using Tile = void (*)(const T*, int64_t, int64_t, const T*, int64_t, bool, T, T*, int64_t);

  // The tiles of so many rows, at most kRows, and one or two vectors of columns.
  struct Tiles {
    Tile narrow, wide;
  };
  template <bool kIsTurned, int kCount = 1>
  static Tiles tiles_of(int64_t rows) {
    if constexpr (kCount < kRows) {
      if (rows != kCount) return tiles_of<kIsTurned, kCount + 1>(rows);
    }
    return {tile<kCount, kIsTurned, 1>, tile<kCount, kIsTurned, 2>};
  }

  // out = factor a b, or out += it. One of a's strides is 1. `packed` is b's block of the first
  // column, from the first of its `depth` rows on; blocks lie `block_stride` apart, and those of
  // out `out_block_stride`. Each number is summed in an order that depends on the depth alone.
  static void multiply(const T* a, int64_t row_stride, int64_t depth_stride, int64_t rows,
                       int64_t depth, const T* packed, int64_t block_stride, int64_t columns,
                       bool adds, T factor, T* out, int64_t out_stride, int64_t out_block_stride) {
    const bool is_turned = depth_stride != 1;
    const int64_t stride = is_turned ? depth_stride : row_stride;
    const int64_t tiles = (rows + kRows - 1) / kRows;
    for (int64_t start = 0; start < depth; start += kDepth) {
      const int64_t count = depth - start < kDepth ? depth - start : kDepth;
      const bool adds_here = adds || start > 0;
      for (int64_t index = 0, row = 0; index < tiles; ++index) {  // of about the same height
        const int64_t height = (rows - row) / (tiles - index);
        const Tiles of_height = is_turned ? tiles_of<true>(height) : tiles_of<false>(height);
        const T* left = a + row * row_stride + start * depth_stride;
        for (int64_t column = 0; column < columns; column += kColumns) {
          const int64_t block = column / kColumns;
          const int64_t width = columns - column < kColumns ? columns - column : kColumns;
          const Tile multiply_tile = width > kLanes ? of_height.wide : of_height.narrow;
          multiply_tile(left, stride, count, packed + start * kColumns + block * block_stride, width,
                        adds_here, factor, out + row * out_stride + block * out_block_stride,
                        out_stride);
        }
        row += height;
      }
    }
  }
};
