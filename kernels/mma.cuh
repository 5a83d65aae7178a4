// The product of two TF32 matrices on a warp's tensor cores (sm_80 and later; PTX ISA, "Matrix
// Fragments for mma.m16n8k8"). TF32 is float32 with 10 bits of mantissa.
#if defined(__CUDA_ARCH__) && TENSOR_CORES
// To nearest, ties away from zero.
__device__ __forceinline__ unsigned int to_tf32(float value) {
  unsigned int bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// C (16, 8) += A (16, 8) B (8, 8), each spread over the warp: with g = lane / 4 and t = lane % 4 a
// lane holds of A (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), of B (t, g), (t + 4, g), and of C
// (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
__device__ __forceinline__ void mma_m16n8k8_tf32(
    float (&c)[4], const unsigned int (&a)[4], const unsigned int (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif
