// Stage `backward`: dS, and the sums over patches dWd = F^T dH, dWu = V^T F^ + H^T (Y - dS). First
// dH and V, by rows; then all of width D, where a thread takes some columns of all patches, so that
// nothing of that width is kept and sums have one order.
#include "math/backward.h"

#include "cpu/stages.h"
#include "math/outlier.h"

namespace singer::cpu {

namespace {

// Patches whose columns a thread works on at once.
constexpr int64_t kPatchesAtOnce = 96;

// Blocks of columns that a thread takes at once, at most: more make longer pieces of rows.
constexpr int64_t kMostBlocks = 4;

// As many as let all threads end at about the same time.
int64_t blocks_at_once(int64_t blocks) {
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  int64_t best = 1, least = blocks + 1;
  for (int64_t width = 1; width <= kMostBlocks; ++width) {
    const int64_t longest = parts_of(parts_of(blocks, width), threads) * width;
    if (longest <= least) {
      best = width;
      least = longest;
    }
  }
  return best;
}

template <typename T>
class Backward {
 public:
  explicit Backward(const BackwardCall<T>& call)
      : call_(call),
        sizes_(call.sizes),
        patches_(sizes_.images * sizes_.patches()),
        has_kd_(call.d_kd != nullptr),
        has_back_(call.d_refined.has_value()),
        has_turned_(call.d_outlier != nullptr || call.d_info != nullptr),
        needs_down_(call.d_down.has_value()),
        needs_up_(call.d_up.has_value()),
        needs_turned_(needs_up_ && has_turned_),
        needs_pulled_(has_kd_ && (needs_up_ || call.d_student != nullptr)),
        needs_refined_(needs_pulled_ || needs_turned_),
        alpha_(has_kd_ ? kd_scale(sizes_.images, sizes_.tokens, sizes_.width, *call.d_kd) : T(0)),
        is_student_direct_(call.d_student_dtype == dtype_of(scalar_type<T>())),
        d_hidden_(needs_down_ ? patches_ * sizes_.rank : 0),
        turned_(needs_turned_ ? patches_ * sizes_.rank : 0) {}

  void prefix() const;
  void rows() const;
  void columns() const;

 private:
  struct Place {
    int64_t image, token;
  };
  Place place_of(int64_t patch) const {
    return {patch / sizes_.patches(), sizes_.prefix + patch % sizes_.patches()};
  }

  char* d_student_at(const Place& place, int64_t column) const {
    const int64_t row = place.image * sizes_.tokens + place.token;
    return call_.d_student + (row * sizes_.width + column) * size_of(call_.d_student_dtype);
  }

  // The transpose of some patches' rows of a matrix [B P, r].
  Matrix<const T> turned_rows(const T* data, int64_t stride, int64_t first, int64_t count) const {
    return Matrix<const T>{data + first * stride, count, sizes_.rank, stride}.transposed();
  }

  class Columns;

  const BackwardCall<T>& call_;
  const Sizes& sizes_;
  int64_t patches_;
  bool has_kd_, has_back_, has_turned_, needs_down_, needs_up_;
  bool needs_turned_;   // V, by dWu
  bool needs_pulled_;   // dS, by itself or by dWu
  bool needs_refined_;  // by dS and, beside V, by dWu
  T alpha_;
  bool is_student_direct_;
  Scratch<T> d_hidden_, turned_;  // dH and V, [B P, r]
};

template <typename T>
void Backward<T>::prefix() const {
  const int64_t width = sizes_.width, count = sizes_.images * sizes_.prefix;
  if (call_.d_student == nullptr) return;
  parallel_ranges(count, 4 * width, [&](int64_t begin, int64_t end) {
    const Scratch<T> buffer(3 * width);
    T* out = buffer.data() + 2 * width;
    for (int64_t i = begin; i < end; ++i) {
      const Place place{i / sizes_.prefix, i % sizes_.prefix};
      const T* teacher = call_.teacher.row(place.image, place.token, buffer.data());
      const T* student = call_.student->row(place.image, place.token, buffer.data() + width);
      loops<T>().student_gradient(teacher, student, alpha_, width, out);
      loops<T>().write(out, call_.d_student_dtype, width, d_student_at(place, 0));
    }
  });
}

// dH = X Z + c Z + a (F^ - S) Wu^T + Y Wu^T and V = X H + c H.
template <typename T>
void Backward<T>::rows() const {
  if (!needs_down_ && !needs_turned_) return;
  const Loops<T>& loop = loops<T>();
  const int64_t width = sizes_.width, rank = sizes_.rank;
  const bool pulls_back = has_back_ && needs_down_;
  const T weight =
      call_.d_outlier == nullptr ? T(0) : *call_.outlier_weight * *call_.d_outlier;
  const T d_info = call_.d_info == nullptr ? T(0) : *call_.d_info;
  const int64_t runs = parts_of(patches_, kRunRows);
  parallel_queue(runs, kRunRows * rank * (pulls_back ? width : 8), [&](Queue& queue) {
    const Scratch<T> back(pulls_back ? kRunRows * width : 0);
    const Scratch<T> from_back(pulls_back ? kRunRows * rank : 0);
    for (int64_t task; queue.take(task);) {
      const Run run{task * kRunRows, std::min(kRunRows, patches_ - task * kRunRows)};
      if (pulls_back) {
        const Matrix<const T> rows = gather(*call_.d_refined, run, sizes_.patches(),
                                            sizes_.prefix, width, back.data());
        call_.up_transposed.multiply(rows, {from_back.data(), run.count, rank, rank});
      }
      for (int64_t i = 0; i < run.count; ++i) {
        const int64_t patch = run.first + i;
        T coefficient = 0;
        if (call_.d_outlier != nullptr) {
          coefficient = outlier_coefficient(call_.norms[patch],
                                            call_.threshold[place_of(patch).image], weight);
        }
        const T* row = call_.columns.row(patch);
        const T* gram_row =
            call_.d_info == nullptr ? nullptr : call_.gram_columns + patch * 2 * rank;
        if (needs_turned_) {
          loop.column_gradient(gram_row, d_info, row, coefficient, nullptr, T(0), nullptr, rank,
                               turned_.data() + patch * rank);
        }
        if (needs_down_) {
          loop.column_gradient(gram_row == nullptr ? nullptr : gram_row + rank, d_info, row + rank,
                               coefficient, has_kd_ ? call_.residual + patch * rank : nullptr,
                               alpha_, pulls_back ? from_back.data() + i * rank : nullptr, rank,
                               d_hidden_.data() + patch * rank);
        }
      }
    }
  });
}

// A thread's work on some columns of all patches.
template <typename T>
class Backward<T>::Columns {
 public:
  Columns(const Backward& stage, int64_t most_blocks)
      : stage_(stage),
        width_(most_blocks * loops<T>().block),
        area_(kPatchesAtOnce * width_),
        teacher_(buffer_size(stage.needs_refined_, call().teacher)),
        // Set, as products read whole vectors of them; what lies beyond the last column is dropped.
        refined_(zeros(stage.needs_refined_)),
        plain_(zeros(stage.needs_down_)),
        pulled_(zeros(stage.needs_pulled_)),
        back_(zeros(uses_back())),
        operand_(buffer_size(stage.needs_down_ && !shares_teacher(), call().operand)),
        student_(stage.needs_pulled_ ? buffer_size(true, *call().student) : 0),
        read_back_(uses_back() ? buffer_size(true, *call().d_refined) : 0),
        d_student_(call().d_student != nullptr && !stage.is_student_direct_ ? area_ : 0),
        sums_(2 * stage.sizes_.rank * width_) {}

  // The blocks from `block` on.
  void run(int64_t block, int64_t blocks) const {
    const int64_t start = block * loops<T>().block;
    const int64_t count = std::min(blocks * loops<T>().block, stage_.sizes_.width - start);
    for (int64_t first = 0; first < stage_.patches_; first += kPatchesAtOnce) {
      step(start, count, {first, std::min(kPatchesAtOnce, stage_.patches_ - first)});
    }
    write(start, count);
  }

 private:
  const BackwardCall<T>& call() const { return stage_.call_; }
  bool uses_back() const { return stage_.has_back_ && stage_.needs_up_; }
  // Whether the products take F as it is, which is read anyway.
  bool shares_teacher() const { return stage_.needs_refined_ && !call().operand.is_rounded(); }
  int64_t buffer_size(bool is_needed, const TokenRows<T>& rows) const {
    return is_needed && !rows.is_direct() ? area_ : 0;
  }
  Scratch<T> zeros(bool is_needed) const {
    Scratch<T> result(is_needed ? area_ : 0);
    if (is_needed) std::fill(result.data(), result.data() + area_, T(0));
    return result;
  }

  Matrix<T> sums(bool of_up, int64_t count) const {
    const int64_t rank = stage_.sizes_.rank;
    return {sums_.data() + (of_up ? rank * width_ : 0), rank, count, width_};
  }

  void step(int64_t start, int64_t count, const Run& run) const;
  void write(int64_t start, int64_t count) const;

  const Backward& stage_;
  int64_t width_, area_;
  Scratch<T> teacher_, refined_, plain_, pulled_, back_, operand_, student_, read_back_, d_student_;
  Scratch<T> sums_;  // dWd^T and dWu of these columns, [r, width_] each
};

template <typename T>
void Backward<T>::Columns::step(int64_t start, int64_t count, const Run& run) const {
  const Loops<T>& loop = loops<T>();
  const int64_t rank = stage_.sizes_.rank, block = loop.block;
  const int64_t block_stride = kPatchesAtOnce * block;
  const T *teacher[kPatchesAtOnce], *operand[kPatchesAtOnce], *student[kPatchesAtOnce],
      *back[kPatchesAtOnce];
  T* d_student[kPatchesAtOnce];
  for (int64_t i = 0; i < run.count; ++i) {
    const Place place = stage_.place_of(run.first + i);
    const auto columns = [&](const TokenRows<T>& rows, const Scratch<T>& buffer) {
      T* own = buffer.data() == nullptr ? nullptr : buffer.data() + i * width_;
      return rows.columns(place.image, place.token, start, count, own);
    };
    if (stage_.needs_refined_) teacher[i] = columns(call().teacher, teacher_);
    if (stage_.needs_down_) {
      operand[i] = shares_teacher() ? teacher[i] : columns(call().operand, operand_);
    }
    if (stage_.needs_pulled_) student[i] = columns(*call().student, student_);
    if (uses_back()) back[i] = columns(*call().d_refined, read_back_);
    if (call().d_student != nullptr) {
      d_student[i] = stage_.is_student_direct_
                         ? reinterpret_cast<T*>(stage_.d_student_at(place, start))
                         : d_student_.data() + i * width_;
    }
  }
  const Matrix<const T> hidden{call().columns.row(run.first), run.count, rank,
                               call().columns.row_stride};
  if (stage_.needs_refined_) {
    Factor<T> up = call().up.factor().from_block(start / block);
    up.columns = round_up(count, loop.lanes);
    up.multiply_blocks(hidden, {refined_.data(), run.count, up.columns, block}, block_stride);
  }
  loop.backward_rows({run.count, count, block_stride, stage_.alpha_, teacher, operand,
                      stage_.needs_pulled_ ? student : nullptr, back, refined_.data(), plain_.data(),
                      pulled_.data(), back_.data(),
                      call().d_student != nullptr ? d_student : nullptr});
  if (call().d_student != nullptr && !stage_.is_student_direct_) {
    for (int64_t i = 0; i < run.count; ++i) {
      loop.write(d_student[i], call().d_student_dtype, count,
                 stage_.d_student_at(stage_.place_of(run.first + i), start));
    }
  }
  const auto add = [&](const Matrix<const T>& left, const Scratch<T>& right, bool of_up, bool adds,
                       T factor) {
    Factor<T>{right.data(), block_stride, count}.multiply(left, sums(of_up, count), adds, factor);
  };
  bool adds = run.first > 0;
  if (stage_.needs_down_) {
    add(stage_.turned_rows(stage_.d_hidden_.data(), rank, run.first, run.count), plain_, false,
        adds, T(1));
  }
  if (stage_.needs_turned_) {
    add(stage_.turned_rows(stage_.turned_.data(), rank, run.first, run.count), refined_, true,
        adds, T(1));
    adds = true;
  }
  if (stage_.needs_up_ && stage_.has_kd_) {
    add(hidden.transposed(), pulled_, true, adds, T(-1));
    adds = true;
  }
  if (uses_back()) add(hidden.transposed(), back_, true, adds, T(1));
}

template <typename T>
void Backward<T>::Columns::write(int64_t start, int64_t count) const {
  const Loops<T>& loop = loops<T>();
  const int64_t rank = stage_.sizes_.rank;
  const auto write_row = [&](const T* row, int64_t length, const Tensor& out, int64_t place) {
    const Dtype dtype = dtype_of(out.scalar_type());
    loop.write(row, dtype, length,
               static_cast<char*>(out.mutable_data_ptr()) + place * size_of(dtype));
  };
  if (stage_.needs_down_) {
    const Matrix<T> down = sums(false, count);
    const Scratch<T> row(rank);
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t i = 0; i < rank; ++i) row.data()[i] = down.row(i)[j];
      write_row(row.data(), rank, *call().d_down, (start + j) * rank);
    }
  }
  if (stage_.needs_up_) {
    const Matrix<T> up = sums(true, count);
    for (int64_t i = 0; i < rank; ++i) {
      write_row(up.row(i), count, *call().d_up, i * stage_.sizes_.width + start);
    }
  }
}

template <typename T>
void Backward<T>::columns() const {
  const int64_t block = loops<T>().block, blocks = parts_of(sizes_.width, block);
  const int64_t at_once = blocks_at_once(blocks), tasks = parts_of(blocks, at_once);
  parallel_queue(tasks, patches_ * at_once * block * sizes_.rank, [&](Queue& queue) {
    const Columns columns(*this, at_once);
    for (int64_t task; queue.take(task);) {
      columns.run(task * at_once, std::min(at_once, blocks - task * at_once));
    }
  });
}

}  // namespace

template <typename T>
void backward(const BackwardCall<T>& call) {
  const Backward<T> stage(call);
  stage.prefix();
  stage.rows();
  stage.columns();
}

template void backward(const BackwardCall<float>&);
template void backward(const BackwardCall<double>&);

}  // namespace singer::cpu
