// Dense matrix products, included by simd_kernels.cpp once per instruction set: vectors of
// SINGER_VECTOR_BYTES, register tiles of SINGER_TILE_ROWS rows. Not BLAS: torch's uses half of the
// vector width on some processors, and can't be fused with the row kernels.

template <typename T>
struct Matmul {
  typedef T Vector __attribute__((vector_size(SINGER_VECTOR_BYTES)));
  static constexpr int64_t kLanes = SINGER_VECTOR_BYTES / sizeof(T);
  static constexpr int64_t kTileRows = SINGER_TILE_ROWS, kPanelWidth = 2 * kLanes;
  static_assert(kBlockRows % kPanelWidth == 0, "a block of rows ends where a panel does");
  // K-block size: a packed panel of this depth fits in L1.
  static constexpr int64_t kBlockDepth = 256;

  // Pack the right factor [rows, columns] in panels of kPanelWidth columns, row-major,
  // `panel_stride` apart. The vector with the last column is padded with zeros; a vector beyond it
  // is not written, as no product reads it.
  static void pack(const T* in, int64_t row_stride, int64_t column_stride, int64_t rows,
                   int64_t columns, T* out, int64_t panel_stride) {
    for (int64_t first = 0; first < columns; first += kPanelWidth) {
      const int64_t count = columns - first < kPanelWidth ? columns - first : kPanelWidth;
      T* to = out + first / kPanelWidth * panel_stride;
      const T* from = in + first * column_stride;
      // 1. Pad the last vector.
      if (count < kPanelWidth && count != kLanes) {
        const int64_t last = count / kLanes * kLanes;
        for (int64_t k = 0; k < rows; ++k) store(Vector{}, to + k * kPanelWidth + last);
      }
      // 2. Row-major input: copy.
      if (column_stride == 1) {
        for (int64_t k = 0; k < rows; ++k) {
          for (int64_t j = 0; j < count; ++j) to[k * kPanelWidth + j] = from[k * row_stride + j];
        }
        continue;
      }
      // 3. Any other input: by columns; column-major, four at a time, as transposed 4 x 4 tiles.
      for (int64_t start = 0; start < rows; start += kBlockDepth) {
        const int64_t stop = start + kBlockDepth < rows ? start + kBlockDepth : rows;
        int64_t j = 0;
        for (; row_stride == 1 && j + 4 <= count; j += 4) {
          int64_t k = start;
          for (; k + 4 <= stop; k += 4) {
            transpose_4x4(from + j * column_stride + k, column_stride, to + k * kPanelWidth + j);
          }
          for (; k < stop; ++k) {
            for (int64_t i = j; i < j + 4; ++i) {
              to[k * kPanelWidth + i] = from[i * column_stride + k];
            }
          }
        }
        for (; j < count; ++j) {
          const T* column = from + j * column_stride;
          for (int64_t k = start; k < stop; ++k) to[k * kPanelWidth + j] = column[k * row_stride];
        }
      }
    }
  }

  // Transpose four rows of four elements; the output rows are kPanelWidth apart.
  static void transpose_4x4(const T* in, int64_t stride, T* out) {
    typedef T Four __attribute__((vector_size(4 * sizeof(T))));
    Four rows[4], pairs[4];
    for (int i = 0; i < 4; ++i) __builtin_memcpy(&rows[i], in + i * stride, sizeof(Four));
    for (int i = 0; i < 2; ++i) {
      const Four &above = rows[2 * i], &below = rows[2 * i + 1];
      pairs[2 * i] = SINGER_SHUFFLE(above, below, 0, 4, 2, 6);
      pairs[2 * i + 1] = SINGER_SHUFFLE(above, below, 1, 5, 3, 7);
    }
    for (int i = 0; i < 2; ++i) {
      const Four left = SINGER_SHUFFLE(pairs[i], pairs[i + 2], 0, 1, 4, 5);
      const Four right = SINGER_SHUFFLE(pairs[i], pairs[i + 2], 2, 3, 6, 7);
      __builtin_memcpy(out + i * kPanelWidth, &left, sizeof(Four));
      __builtin_memcpy(out + (i + 2) * kPanelWidth, &right, sizeof(Four));
    }
  }

  static Vector load(const T* from) {
    Vector vector;
    __builtin_memcpy(&vector, from, sizeof(vector));
    return vector;
  }

  static void store(Vector vector, T* to) { __builtin_memcpy(to, &vector, sizeof(vector)); }

  // out = factor a b or, with `accumulate`, out += factor a b, of kCount rows and at most kVectors
  // vectors of a panel's columns. `stride` is of a's columns if kIsTransposed, else of its rows.
  template <int kCount, bool kIsTransposed, int kVectors>
  static void tile(const T* a, int64_t stride, int64_t depth, const T* b, int64_t columns,
                   bool accumulate, T factor, T* out, int64_t out_stride) {
    constexpr int64_t kWidth = kVectors * kLanes;
    // 1. a b, in registers.
    Vector sums[kCount][kVectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
      Vector right[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * kPanelWidth + v * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) {
        const T value = kIsTransposed ? a[i + k * stride] : a[i * stride + k];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[i][v] += value * right[v];
      }
    }
    // 2. Scale and store; an incomplete last vector goes through `values`.
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      T* row = out + i * out_stride;
      if (columns == kWidth) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          Vector result = factor * sums[i][v];
          if (accumulate) result += load(row + v * kLanes);
          store(result, row + v * kLanes);
        }
        continue;
      }
      T values[kWidth];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) store(sums[i][v], values + v * kLanes);
      for (int64_t j = 0; j < columns; ++j) {
        row[j] = factor * values[j] + (accumulate ? row[j] : T(0));
      }
    }
  }

  using Tile = void (*)(const T*, int64_t, int64_t, const T*, int64_t, bool, T, T*, int64_t);

  // Kernels of tiles with one and with two vectors of columns.
  struct Tiles {
    Tile narrow, wide;
  };

  // Return the kernels of tiles with that many rows, at most kTileRows.
  template <bool kIsTransposed, int kCount = 1>
  static Tiles tiles_with(int64_t rows) {
    if constexpr (kCount < kTileRows) {
      if (rows != kCount) return tiles_with<kIsTransposed, kCount + 1>(rows);
    }
    return {tile<kCount, kIsTransposed, 1>, tile<kCount, kIsTransposed, 2>};
  }

  // out = factor a b or, with `accumulate`, out += factor a b. One of a's strides is 1. `packed` is
  // b's panel of the first column, at the first of its `depth` rows; panels of b are `panel_stride`
  // apart, those of out `out_panel_stride`. The order of summation depends on the depth alone.
  static void multiply(const T* a, int64_t row_stride, int64_t depth_stride, int64_t rows,
                       int64_t depth, const T* packed, int64_t panel_stride, int64_t columns,
                       bool accumulate, T factor, T* out, int64_t out_stride,
                       int64_t out_panel_stride) {
    const bool is_transposed = depth_stride != 1;
    const int64_t stride = is_transposed ? depth_stride : row_stride;
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    // K blocks, then rows by tile, then panels: a's tile stays in L1 through all panels.
    for (int64_t start = 0; start < depth; start += kBlockDepth) {
      const int64_t count = depth - start < kBlockDepth ? depth - start : kBlockDepth;
      const bool accumulates = accumulate || start > 0;
      for (int64_t index = 0, row = 0; index < tiles; ++index) {
        const int64_t height = (rows - row) / (tiles - index);  // nearly equal heights
        const Tiles kernels = is_transposed ? tiles_with<true>(height) : tiles_with<false>(height);
        const T* left = a + row * row_stride + start * depth_stride;
        for (int64_t column = 0; column < columns; column += kPanelWidth) {
          const int64_t panel = column / kPanelWidth;
          const int64_t width = columns - column < kPanelWidth ? columns - column : kPanelWidth;
          const T* right = packed + start * kPanelWidth + panel * panel_stride;
          const Tile kernel = width > kLanes ? kernels.wide : kernels.narrow;
          kernel(left, stride, count, right, width, accumulates, factor,
                 out + row * out_stride + panel * out_panel_stride, out_stride);
        }
        row += height;
      }
    }
  }
};
