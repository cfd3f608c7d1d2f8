// SPDX-License-Identifier: Apache-2.0
// The words in which the kernels of this folder are written. nvcc makes instructions of them. With DRSEG_EMULATE a host
// compiler runs the same source in tests/emulator, where every access is checked.
//
// Memory is reached through Global and Shared: `get`, `set`, and `get_as`, `set_as` for several elements at once. There
// is no other pointer, so the emulator sees all of it.
#pragma once

#ifdef DRSEG_EMULATE
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

// threads of a block, and how many blocks a multiprocessor should hold at least
#define DRSEG_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define DRSEG_DEVICE __device__ __forceinline__
#define DRSEG_PRAGMA(words) _Pragma(#words)
#define DRSEG_UNROLL DRSEG_PRAGMA(unroll)
#define DRSEG_UNROLL_BY(times) DRSEG_PRAGMA(unroll times)

namespace drseg::device {

constexpr int LANES = 32;
constexpr unsigned ALL = 0xffffffffu;

using half = __half;
using bfloat16 = __nv_bfloat16;

DRSEG_DEVICE float widen(float value) { return value; }
DRSEG_DEVICE float widen(half value) { return __half2float(value); }
DRSEG_DEVICE float widen(bfloat16 value) { return __bfloat162float(value); }
template <class T>
DRSEG_DEVICE T narrow(float value) {
  if constexpr (std::is_same_v<T, half>)
    return __float2half_rn(value);
  else if constexpr (std::is_same_v<T, bfloat16>)
    return __float2bfloat16_rn(value);
  else
    return value;
}

DRSEG_DEVICE int thread_index() { return int(threadIdx.x); }
DRSEG_DEVICE int lane_index() { return int(threadIdx.x) & 31; }
DRSEG_DEVICE int warp_index() { return int(threadIdx.x) >> 5; }
DRSEG_DEVICE uint3 block_index() { return blockIdx; }

DRSEG_DEVICE int bits_of(float value) { return __float_as_int(value); }
DRSEG_DEVICE float float_of(int bits) { return __int_as_float(bits); }
DRSEG_DEVICE int count_bits(unsigned value) { return __popc(value); }
DRSEG_DEVICE int first_bit(unsigned value) { return __ffs(int(value)) - 1; }
// max(value, 0), and NaN of NaN
DRSEG_DEVICE float positive(float value) {
  float found;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(found) : "f"(value));
  return found;
}
DRSEG_DEVICE float exp(float value) { return ::expf(value); }
DRSEG_DEVICE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
DRSEG_DEVICE float log1p(float value) { return ::log1pf(value); }
DRSEG_DEVICE float sqrt(float value) { return __fsqrt_rn(value); }
DRSEG_DEVICE float reciprocal_root(float value) { return __fdiv_rn(1.0f, __fsqrt_rn(value)); }

DRSEG_DEVICE void sync_block() { __syncthreads(); }
DRSEG_DEVICE void sync_warp() { __syncwarp(); }
DRSEG_DEVICE void sync_named(int id, unsigned threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

DRSEG_DEVICE unsigned ballot(bool mine) { return __ballot_sync(ALL, mine); }
template <class T>
DRSEG_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(ALL, value, lane);
}
template <class T>
DRSEG_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(ALL, value, mask);
}
DRSEG_DEVICE int warp_sum(int value) { return __reduce_add_sync(ALL, value); }
DRSEG_DEVICE int warp_min(int value) { return __reduce_min_sync(ALL, value); }
DRSEG_DEVICE int warp_max(int value) { return __reduce_max_sync(ALL, value); }

template <class T>
class Global {
  using Value = std::remove_const_t<T>;

 public:
  __host__ __device__ Global(T* start, int64_t) : start_(start) {}

  // The memory from element i on. Places counted from there fit into 32 bits, and their address is one instruction. The
  // asm statement hides the pointer: else the compiler would add up 64 bits in every use, to save the registers.
  DRSEG_DEVICE Global from(int64_t i) const {
    T* start = start_ + i;
    asm volatile("" : "+l"(start));
    return Global(start, 0);
  }

  DRSEG_DEVICE Value get(int64_t i) const {
    if constexpr (std::is_const_v<T> && requires { __ldg(start_); })
      return __ldg(start_ + i);
    else
      return start_[i];
  }
  DRSEG_DEVICE void set(int64_t i, Value value) const { start_[i] = value; }
  template <class V>
  DRSEG_DEVICE V get_as(int64_t i) const {
    return *reinterpret_cast<const V*>(start_ + i);
  }
  template <class V>
  DRSEG_DEVICE void set_as(int64_t i, V value) const {
    *reinterpret_cast<V*>(start_ + i) = value;
  }
  DRSEG_DEVICE Value add(int64_t i, Value value) const {
    static_assert(std::is_integral_v<Value>);
    return atomicAdd(start_ + i, value);
  }
  DRSEG_DEVICE const T* address(int64_t i) const { return start_ + i; }

 private:
  T* start_;
};

extern __shared__ __align__(128) unsigned char shared_memory[];

template <class T>
class Shared {
 public:
  DRSEG_DEVICE Shared(size_t offset, int) : start_(reinterpret_cast<T*>(shared_memory + offset)) {}
  DRSEG_DEVICE explicit Shared(T* start) : start_(start) {}

  // What begins with element i.
  DRSEG_DEVICE Shared from(int i) const { return Shared(start_ + i); }

  DRSEG_DEVICE T get(int i) const { return start_[i]; }
  DRSEG_DEVICE void set(int i, T value) const { start_[i] = value; }
  template <class V>
  DRSEG_DEVICE V get_as(int i) const {
    return *reinterpret_cast<const V*>(start_ + i);
  }
  template <class V>
  DRSEG_DEVICE void set_as(int i, V value) const {
    *reinterpret_cast<V*>(start_ + i) = value;
  }
  DRSEG_DEVICE T add(int i, T value) const {
    static_assert(std::is_integral_v<T>);
    return atomicAdd(start_ + i, value);
  }
  DRSEG_DEVICE unsigned address(int i) const { return unsigned(__cvta_generic_to_shared(start_ + i)); }

 private:
  T* start_;
};

// 16 bytes from `from[j]` to `to[i]`, or zeros; both aligned. They have arrived when this thread has waited for their
// group, for the others at the barrier after that.
template <class T>
DRSEG_DEVICE void copy_async(const Shared<T>& to, int i, const Global<const T>& from, int64_t j, bool on = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address(i)), "l"(from.address(on ? j : 0)),
               "r"(on ? 16 : 0)
               : "memory");
}
DRSEG_DEVICE void copies_end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS>
DRSEG_DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements, whose rows begin where the lanes say: lane l those of matrix l / 8, row l % 8.
template <bool TRANSPOSED = false, class T>
DRSEG_DEVICE void load_matrices(uint32_t (&to)[4], const Shared<T>& from, int i) {
  const unsigned row = from.address(i);
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}

#define DRSEG_MMA(shape, types)                                                                                   \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." types ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// sums (16, 8) += a (16, 16) b (16, 8) of a warp, each lane with its share as mma.sync has it; float16 or bfloat16
template <class T>
DRSEG_DEVICE void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, half>)
    DRSEG_MMA("m16n8k16", "f16.f16");
  else
    DRSEG_MMA("m16n8k16", "bf16.bf16");
}
// the same of TF32, 8 deep: float32 whose last 13 bits count for nothing
DRSEG_DEVICE void multiply_add_tf32(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  DRSEG_MMA("m16n8k8", "tf32.tf32");
}
#undef DRSEG_MMA

struct Launch {
  unsigned blocks_x, blocks_y, threads;
  size_t shared_bytes;
  void* stream = nullptr;
};

inline void expect(cudaError_t found, const char* what) {
  if (found != cudaSuccess) throw std::runtime_error(std::string("drseg_native_cuda: ") + what + ": " + cudaGetErrorString(found));
}

inline int attribute_of_device(cudaDeviceAttr which) {
  int device = 0, value = 0;
  expect(cudaGetDevice(&device), "device");
  expect(cudaDeviceGetAttribute(&value, which, device), "attribute");
  return value;
}
// Of the current device: the most shared memory that a block may have, and how many blocks that take so much of it run
// at once.
inline size_t most_shared_bytes() { return size_t(attribute_of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin)); }
inline int blocks_at_once(size_t shared_bytes, unsigned threads) {
  // the driver takes 1024 bytes of each block for itself
  const size_t by_memory = attribute_of_device(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / (shared_bytes + 1024);
  const size_t by_threads = attribute_of_device(cudaDevAttrMaxThreadsPerMultiProcessor) / threads;
  return attribute_of_device(cudaDevAttrMultiProcessorCount) * int(std::max<size_t>(1, std::min(by_memory, by_threads)));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Launch& how, Arguments&&... arguments) {
  if (how.shared_bytes > (48 << 10))
    expect(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(how.shared_bytes)), "shared memory");
  kernel<<<dim3(how.blocks_x, how.blocks_y), how.threads, how.shared_bytes, static_cast<cudaStream_t>(how.stream)>>>(
      Parameters(std::forward<Arguments>(arguments))...);
  expect(cudaGetLastError(), "launch");
}

}  // namespace drseg::device
#endif
