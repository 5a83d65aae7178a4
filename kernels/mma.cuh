// The product of two TF32 matrices on a warp's tensor cores (sm_80 and later; PTX ISA, "Matrix
// Fragments for mma.m16n8k8"). TF32 is float32 with 10 bits of mantissa.
#if defined(__CUDA_ARCH__) && TENSOR_CORES
// To nearest, ties away from zero; from sm_90 to even, since that is one instruction there. The
// host shim does the first, and the second where a test asks for it (TIES_TO_EVEN).
__device__ __forceinline__ unsigned int to_tf32(float value) {
  unsigned int bits;
#if __CUDA_ARCH__ >= 900
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#endif
  return bits;
}

// Four matrices (8, 4) from shared memory (PTX ISA, "ldmatrix"): `row` of lane 8 i + r is where row
// r of matrix i lies, and each lane gets of all four the element (lane / 4, lane % 4).
__device__ __forceinline__ void load_matrices(float (&values)[4], const float* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
               : "r"(shared_address(row))
               : "memory");
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
