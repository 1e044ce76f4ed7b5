#include "arrays.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>

namespace x_rope_cls::test {

namespace {

constexpr int kFill = 0xff;

float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (std::isnan(value)) {
    return 0x7fc0;
  }
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

double load(DType dtype, const char* from) {
  switch (dtype) {
    case DType::kFloat32: {
      float value;
      std::memcpy(&value, from, sizeof(value));
      return value;
    }
    case DType::kFloat64: {
      double value;
      std::memcpy(&value, from, sizeof(value));
      return value;
    }
    case DType::kBFloat16: {
      uint16_t bits;
      std::memcpy(&bits, from, sizeof(bits));
      return bfloat16_to_float(bits);
    }
    case DType::kFloat16: {
      _Float16 value;
      std::memcpy(&value, from, sizeof(value));
      return static_cast<double>(value);
    }
    case DType::kBool:
      return *from != 0 ? 1.0 : 0.0;
  }
  return 0.0;
}

template <typename T>
void put(char* to, T value) {
  std::memcpy(to, &value, sizeof(value));
}

void store(DType dtype, char* to, double value) {
  switch (dtype) {
    case DType::kFloat32:
      return put(to, static_cast<float>(value));
    case DType::kFloat64:
      return put(to, value);
    case DType::kBFloat16:
      return put(to, float_to_bfloat16(static_cast<float>(value)));
    case DType::kFloat16:
      return put(to, static_cast<_Float16>(value));
    case DType::kBool:
      return put(to, static_cast<uint8_t>(value != 0.0 ? 1 : 0));
  }
}

}  // namespace

naive::Array Random::normal_array(int64_t b, int64_t h, int64_t n, int64_t d) {
  naive::Array array(b, h, n, d);
  for (double& value : array.values) {
    value = normal();
  }
  return array;
}

naive::Array Random::bool_array(int64_t b, int64_t h, int64_t n, int64_t d, double p) {
  naive::Array array(b, h, n, d);
  for (double& value : array.values) {
    value = chance(p) ? 1.0 : 0.0;
  }
  return array;
}

int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kBool:
      return 1;
  }
  return 0;
}

DType compute_type(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    case DType::kBool:
      return "bool";
  }
  return "?";
}

double tolerance(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 1e-11;
    case DType::kFloat32:
      return 3e-5;
    case DType::kFloat16:
      return 4e-3;
    default:
      // Dot products of pairs take weights and gradients of scores rounded to bfloat16 as well.
      return 5e-2;
  }
}

Tensor::Tensor(Random& random, DType dtype, int64_t b, int64_t h, int64_t n, int64_t d)
    : dtype_(dtype), sizes_{b, h, n, d} {
  int order[4] = {3, 2, 1, 0};  // innermost first
  if (random.chance(0.5)) {
    std::swap(order[1], order[2]);  // (batch, tokens, heads, channels)
  }
  if (random.chance(0.2)) {
    std::swap(order[0], order[random.integer(1, 3)]);
  }
  int64_t next = 1;
  for (const int axis : order) {
    strides_[axis] = next * (random.chance(0.1) ? 2 : 1);
    next = strides_[axis] * std::max<int64_t>(1, sizes_[axis]) +
           (random.chance(0.2) ? random.integer(1, 9) : 0);
  }
  offset_bytes_ = random.integer(0, 3) * size_of(dtype);
  allocate();
}

Tensor::Tensor(DType dtype, int64_t b, int64_t h, int64_t n, int64_t d)
    : dtype_(dtype), sizes_{b, h, n, d}, strides_{h * n * d, n * d, d, 1} {
  allocate();
}

Tensor Tensor::holding(Random& random, DType dtype, naive::Array& values) {
  Tensor tensor(random, dtype, values.b, values.h, values.n, values.d);
  tensor.set(values);
  return tensor;
}

Tensor Tensor::holding(DType dtype, naive::Array& values) {
  Tensor tensor(dtype, values.b, values.h, values.n, values.d);
  tensor.set(values);
  return tensor;
}

void Tensor::set(naive::Array& from) {
  int64_t i = 0;
  each([&](int64_t element) {
    store(dtype_, storage_.get() + offset_bytes_ + element * size_of(dtype_), from.values[i++]);
  });
  from = values();
}

void Tensor::allocate() {
  extent_ = 1;
  for (int axis = 0; axis < 4; ++axis) {
    extent_ = sizes_[axis] == 0 ? 0 : extent_;
  }
  for (int axis = 0; axis < 4 && extent_ > 0; ++axis) {
    extent_ += (sizes_[axis] - 1) * strides_[axis];
  }
  const int64_t bytes = offset_bytes_ + extent_ * size_of(dtype_);
  storage_ = std::make_unique<char[]>(bytes);
  std::memset(storage_.get(), kFill, bytes);
}

// visit(element) in C order, an element counted from the start of the tensor.
template <typename Visit>
void Tensor::each(const Visit& visit) const {
  for (int64_t b = 0; b < sizes_[0]; ++b) {
    for (int64_t h = 0; h < sizes_[1]; ++h) {
      for (int64_t n = 0; n < sizes_[2]; ++n) {
        for (int64_t d = 0; d < sizes_[3]; ++d) {
          visit(b * strides_[0] + h * strides_[1] + n * strides_[2] + d * strides_[3]);
        }
      }
    }
  }
}

void Tensor::fill(double value) {
  each([&](int64_t element) {
    store(dtype_, storage_.get() + offset_bytes_ + element * size_of(dtype_), value);
  });
}

naive::Array Tensor::values() const {
  naive::Array array(sizes_[0], sizes_[1], sizes_[2], sizes_[3]);
  int64_t i = 0;
  each([&](int64_t element) {
    array.values[i++] = load(dtype_, storage_.get() + offset_bytes_ + element * size_of(dtype_));
  });
  return array;
}

bool Tensor::gaps_untouched() const {
  const int64_t size = size_of(dtype_);
  std::vector<char> own(offset_bytes_ + extent_ * size, 0);
  each(
      [&](int64_t element) { std::fill_n(own.begin() + offset_bytes_ + element * size, size, 1); });
  for (size_t i = 0; i < own.size(); ++i) {
    if (!own[i] && static_cast<unsigned char>(storage_[i]) != kFill) {
      return false;
    }
  }
  return true;
}

double relative_error(const naive::Array& got, const naive::Array& expected) {
  double error = 0.0, largest = 1.0;
  for (size_t i = 0; i < expected.values.size(); ++i) {
    const double a = got.values[i], b = expected.values[i];
    if (std::isfinite(a) && std::isfinite(b)) {
      error = std::max(error, std::abs(a - b));
      largest = std::max(largest, std::abs(b));
    } else if (a != b) {
      return std::numeric_limits<double>::infinity();
    }
  }
  return error / largest;
}

void Workers::run(void* context, int64_t workers, void (*body)(void*, int64_t), void* argument) {
  if (!static_cast<Workers*>(context)->side_by_side_) {
    for (int64_t worker = workers - 1; worker >= 0; --worker) {
      body(argument, worker);
    }
    return;
  }
  std::vector<std::jthread> threads;
  threads.reserve(workers);
  for (int64_t worker = 0; worker < workers; ++worker) {
    threads.emplace_back(body, argument, worker);
  }
}

Workspace::Workspace(int64_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, 64, std::max<int64_t>(1, bytes)) != 0) {
    std::abort();
  }
  std::memset(data, kFill, bytes);
  data_.reset(data);
}

void Workspace::Free::operator()(void* p) const { std::free(p); }

void Checker::values(const char* what, DType dtype, const naive::Array& got,
                     const naive::Array& expected, int64_t summands) {
  const double error = relative_error(got, expected);
  const double growth = std::max(1.0, std::sqrt(static_cast<double>(summands)) / 4);
  const double limit = growth * std::max(tolerance(dtype), tolerance(dtype_));
  if (!(error <= limit)) {
    std::printf("%s: %s is off by %g, allowed %g\n", name_.c_str(), what, error, limit);
    passed_ = false;
  }
}

void Checker::gaps(const char* what, const Tensor& tensor) {
  if (!tensor.gaps_untouched()) {
    std::printf("%s: memory between the elements of %s was written to\n", name_.c_str(), what);
    passed_ = false;
  }
}

void Checker::holds(const char* what, bool condition) {
  if (condition) return;
  std::printf("%s: this does not hold: %s\n", name_.c_str(), what);
  passed_ = false;
}

RotaryTensors::RotaryTensors(Random& random, DType dtype, int64_t batch, int64_t heads,
                             int64_t tokens, int64_t pairs) {
  const int64_t table_batch = random.chance(0.3) ? batch : 1,
                table_heads = random.chance(0.3) ? heads : 1;
  arrays.cos = random.normal_array(table_batch, table_heads, tokens, pairs);
  arrays.sin = random.normal_array(table_batch, table_heads, tokens, pairs);
  cos = Tensor::holding(random, compute_type(dtype), arrays.cos);
  sin = Tensor::holding(random, compute_type(dtype), arrays.sin);
  if (random.chance(0.8)) {
    arrays.rotate = random.bool_array(random.chance(0.5) ? batch : 1, 1, tokens, 1,
                                      random.one_of({0.0, 0.2, 0.8, 1.0}));
    rotate = Tensor::holding(random, DType::kBool, arrays.rotate);
  }
}

RotaryTable RotaryTensors::table() const {
  RotaryTable t{};
  t.cos = cos.data();
  t.sin = sin.data();
  t.cos_stride_b = cos.stride(0);
  t.cos_stride_h = cos.stride(1);
  t.cos_stride_n = cos.view().stride_n;
  t.cos_stride_i = cos.view().stride_d;
  t.sin_stride_b = sin.stride(0);
  t.sin_stride_h = sin.stride(1);
  t.sin_stride_n = sin.view().stride_n;
  t.sin_stride_i = sin.view().stride_d;
  if (!arrays.rotate.values.empty()) {
    t.rotate = static_cast<const uint8_t*>(rotate.data());
    t.rotate_stride_b = rotate.stride(0);
    t.rotate_stride_n = rotate.view().stride_n;
  }
  return t;
}

}  // namespace x_rope_cls::test
