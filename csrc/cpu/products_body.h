// Dense products, included beside loops_body.h once per vector width: SINGER_BYTES wide, tiles of
// SINGER_ROWS rows. torch's library is not asked: on processors of some makers it leaves half of
// the width unused, and its products can't end where the next loop begins.

template <typename T>
struct Product {
  typedef T Vector __attribute__((vector_size(SINGER_BYTES)));
  static constexpr int64_t kLanes = SINGER_BYTES / sizeof(T);
  static constexpr int64_t kRows = SINGER_ROWS, kColumns = 2 * kLanes;
  // Of the right factor, so many rows of a tile's columns stay in the first cache.
  static constexpr int64_t kDepth = 256;

  // The right factor [rows, columns] as blocks of kColumns columns, row by row, with zeros beyond
  // the last column; the blocks from `begin` to `end` of it, `block_stride` apart.
  static void pack(const T* in, int64_t row_stride, int64_t column_stride, int64_t rows,
                   int64_t columns, int64_t begin, int64_t end, T* out, int64_t block_stride) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kColumns;
      const int64_t count = columns - first < kColumns ? columns - first : kColumns;
      T* to = out + block * block_stride;
      const T* from = in + first * column_stride;
      if (column_stride == 1) {
        for (int64_t k = 0; k < rows; ++k) {
          for (int64_t j = 0; j < count; ++j) to[k * kColumns + j] = from[k * row_stride + j];
          for (int64_t j = count; j < kColumns; ++j) to[k * kColumns + j] = T(0);
        }
        continue;
      }
      for (int64_t start = 0; start < rows; start += kDepth) {
        const int64_t stop = start + kDepth < rows ? start + kDepth : rows;
        for (int64_t j = 0; j < kColumns; ++j) {
          const T* column = from + j * column_stride;
          for (int64_t k = start; k < stop; ++k) {
            to[k * kColumns + j] = j < count ? column[k * row_stride] : T(0);
          }
        }
      }
    }
  }

  static Vector load(const T* from) {
    Vector vector;
    __builtin_memcpy(&vector, from, sizeof(vector));
    return vector;
  }

  static void store(Vector vector, T* to) { __builtin_memcpy(to, &vector, sizeof(vector)); }

  // out = factor a b, or out += it, of kCount rows and a block of columns. With kIsTurned a row's
  // numbers lie `stride` apart and the rows side by side; else the other way round.
  template <int kCount, bool kIsTurned>
  static void tile(const T* a, int64_t stride, int64_t depth, const T* b, int64_t columns,
                   bool adds, T factor, T* out, int64_t out_stride) {
    Vector sums[kCount][2] = {};
    for (int64_t k = 0; k < depth; ++k) {
      const Vector left = load(b + k * kColumns), right = load(b + k * kColumns + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) {
        const T value = kIsTurned ? a[i + k * stride] : a[i * stride + k];
        sums[i][0] += value * left;
        sums[i][1] += value * right;
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      T* row = out + i * out_stride;
      if (columns == kColumns) {
        Vector left = factor * sums[i][0], right = factor * sums[i][1];
        if (adds) {
          left += load(row);
          right += load(row + kLanes);
        }
        store(left, row);
        store(right, row + kLanes);
        continue;
      }
      T values[kColumns];
      store(sums[i][0], values);
      store(sums[i][1], values + kLanes);
      for (int64_t j = 0; j < columns; ++j) row[j] = factor * values[j] + (adds ? row[j] : T(0));
    }
  }

  using Tile = void (*)(const T*, int64_t, int64_t, const T*, int64_t, bool, T, T*, int64_t);

  // The tile of so many rows, at most kRows.
  template <bool kIsTurned, int kCount = 1>
  static Tile tile_of(int64_t rows) {
    if constexpr (kCount < kRows) {
      return rows == kCount ? tile<kCount, kIsTurned> : tile_of<kIsTurned, kCount + 1>(rows);
    } else {
      return tile<kCount, kIsTurned>;
    }
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
        const Tile multiply_tile = is_turned ? tile_of<true>(height) : tile_of<false>(height);
        const T* left = a + row * row_stride + start * depth_stride;
        for (int64_t column = 0; column < columns; column += kColumns) {
          const int64_t block = column / kColumns;
          multiply_tile(left, stride, count, packed + start * kColumns + block * block_stride,
                        columns - column < kColumns ? columns - column : kColumns, adds_here,
                        factor, out + row * out_stride + block * out_block_stride, out_stride);
        }
        row += height;
      }
    }
  }
};
