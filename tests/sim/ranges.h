// Which memory the kernels of a call may touch: exactly that of the tensors in its parameters.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "kernels/attention.h"
#include "kernels/pooling.h"
#include "kernels/rope.h"

namespace x_rope_cls::sim {

struct Axis {
  int64_t size, stride;
};

// Registers ranges with the simulator, from the first added to the end of the scope.
class Ranges {
 public:
  Ranges(const RopeParams* calls, int count);
  explicit Ranges(const RopeTableGradParams& p);
  explicit Ranges(const AttentionParams& p);
  explicit Ranges(const AttentionBackwardParams& p);
  explicit Ranges(const PoolParams& p);
  explicit Ranges(const PoolBackwardParams& p);
  ~Ranges();
  Ranges(const Ranges&) = delete;
  Ranges& operator=(const Ranges&) = delete;

 private:
  Ranges();  // nothing but a byte of its own, so that other host memory is out of bounds
  void add(const void* data, int64_t element_size, std::initializer_list<Axis> axes);
  void add(DType dtype, const Tensor4& t, int64_t batch, int64_t heads, int64_t tokens,
           int64_t channels);
  void add(DType dtype, const Tensor3& t, int64_t batch, int64_t tokens, int64_t channels);
  void add(DType compute, const RotaryTable& t, int64_t batch, int64_t heads, int64_t tokens,
           int64_t pairs);

  std::vector<const void*> starts_;
};

}  // namespace x_rope_cls::sim
