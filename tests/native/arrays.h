// Tensors of random strides in buffers of exactly their size, and their values as float64 arrays.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/dtype.h"
#include "kernels/parallel.h"
#include "kernels/rope.h"
#include "naive.h"

namespace x_rope_cls::test {

// Random choices of one case.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t integer(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }
  bool chance(double p) { return std::bernoulli_distribution(p)(engine_); }
  double normal() { return std::normal_distribution<double>()(engine_); }
  template <typename T>
  T one_of(std::initializer_list<T> choices) {
    return choices.begin()[integer(0, static_cast<int64_t>(choices.size()) - 1)];
  }
  naive::Array normal_array(int64_t b, int64_t h, int64_t n, int64_t d);
  naive::Array bool_array(int64_t b, int64_t h, int64_t n, int64_t d, double p);

 private:
  std::mt19937_64 engine_;
};

int64_t size_of(DType dtype);
DType compute_type(DType dtype);
const char* name_of(DType dtype);
// How far a result of a kernel may be from the exact one, relative to the largest exact value or 1.
double tolerance(DType dtype);

// One tensor of the kernels. Elements between its own hold NaN (all bits set), and must keep it.
class Tensor {
 public:
  Tensor() = default;
  // Any strides; unset elements are NaN.
  Tensor(Random& random, DType dtype, int64_t b, int64_t h, int64_t n, int64_t d);
  // Strides of C order.
  Tensor(DType dtype, int64_t b, int64_t h, int64_t n, int64_t d);
  // Holds `values`, which are rounded to dtype; any strides, or those of C order.
  static Tensor holding(Random& random, DType dtype, naive::Array& values);
  static Tensor holding(DType dtype, naive::Array& values);

  Tensor4 view() const { return {data(), strides_[0], strides_[1], strides_[2], strides_[3]}; }
  void* data() const {
    return storage_.get() == nullptr ? nullptr : storage_.get() + offset_bytes_;
  }
  // 0 along axes of size 1, which are broadcast.
  int64_t stride(int axis) const { return sizes_[axis] == 1 ? 0 : strides_[axis]; }
  void fill(double value);
  // Takes `values`, which are rounded to dtype.
  void set(naive::Array& values);
  naive::Array values() const;
  // Whether the elements between are as they were.
  bool gaps_untouched() const;

 private:
  void allocate();
  template <typename Visit>
  void each(const Visit& visit) const;

  DType dtype_ = DType::kFloat32;
  int64_t sizes_[4] = {0, 0, 0, 0};
  int64_t strides_[4] = {0, 0, 0, 0};
  int64_t extent_ = 0, offset_bytes_ = 0;
  std::unique_ptr<char[]> storage_;
};

// Largest error of `got` relative to max(1, the largest finite expected value); infinite where one
// of the two is not finite and the other is something else.
double relative_error(const naive::Array& got, const naive::Array& expected);

// Threads for a kernel: really side by side, or one after the other in reverse order.
class Workers {
 public:
  explicit Workers(Random& random)
      : count_(random.integer(1, 4)), side_by_side_(random.chance(0.5)) {}
  Parallel parallel() { return {count_, run, this}; }
  int64_t count() const { return count_; }

 private:
  static void run(void* context, int64_t workers, void (*body)(void*, int64_t), void* argument);
  int64_t count_;
  bool side_by_side_;
};

// Memory as a caller of the kernels provides it: 64-byte aligned, of exactly the size asked for,
// full of NaN.
class Workspace {
 public:
  explicit Workspace(int64_t bytes);
  void* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(void* p) const;
  };
  std::unique_ptr<void, Free> data_;
};

// Reports every result of one case.
class Checker {
 public:
  Checker(std::string name, DType dtype) : name_(std::move(name)), dtype_(dtype) {}
  // summands: how many independently rounded terms add up in an element where they are many.
  void values(const char* what, DType dtype, const naive::Array& got, const naive::Array& expected,
              int64_t summands = 1);
  void gaps(const char* what, const Tensor& tensor);
  void holds(const char* what, bool condition);
  bool passed() const { return passed_; }

 private:
  std::string name_;
  DType dtype_;
  bool passed_ = true;
};

// Tables and `rotate` of one sequence, as arrays and as the kernels take them.
struct RotaryTensors {
  naive::Rotary arrays;
  Tensor cos, sin, rotate;

  RotaryTensors() = default;
  RotaryTensors(Random& random, DType dtype, int64_t batch, int64_t heads, int64_t tokens,
                int64_t pairs);
  RotaryTable table() const;
};

}  // namespace x_rope_cls::test
