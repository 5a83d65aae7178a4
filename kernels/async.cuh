// Copies from global to shared memory that go on while the thread computes (cp.async, sm_80 and
// later; PTX ISA, "cp.async"). `bytes` of the 16 or 4 are copied, the rest become zero, and with no
// bytes the source is not read. On older GPUs a copy is done when the function returns.
#ifdef __CUDA_ARCH__
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ unsigned int shared_address(const float* pointer) {
  return (unsigned int)__cvta_generic_to_shared(pointer);
}

__device__ __forceinline__ void copy_async_16(float* target, const float* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)),
               "l"(source), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void copy_async_4(float* target, const float* source, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(target)),
               "l"(source), "r"(bytes)
               : "memory");
}

// Closes the group of the copies since the last.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Returns once all of this thread's groups but the newest GROUPS have landed.
template <int GROUPS>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}
#else
__device__ __forceinline__ void copy_async_16(float* target, const float* source, int bytes) {
  *(float4*)target = bytes ? *(const float4*)source : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

__device__ __forceinline__ void copy_async_4(float* target, const float* source, int bytes) {
  *target = bytes ? *source : 0.0f;
}

__device__ __forceinline__ void commit_copies() {}

template <int GROUPS>
__device__ __forceinline__ void wait_copies() {}
#endif
#endif
