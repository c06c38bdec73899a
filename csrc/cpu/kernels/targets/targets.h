// The tables of this build besides the portable one. A build for this processor (DDPM_FAST_NATIVE) has only the tables
// that the processor can run.
#pragma once

#if defined(__x86_64__)
#if !defined(DDPM_FAST_NATIVE) || (defined(__AVX2__) && defined(__FMA__))
#define DDPM_FAST_AVX2
#endif
#if !defined(DDPM_FAST_NATIVE) || defined(DDPM_FAST_EMULATE_AVX512) ||                                  \
    (defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512CD__) && defined(__AVX512DQ__) && \
     defined(__AVX512VL__))
#define DDPM_FAST_AVX512
#endif
#if defined(DDPM_FAST_AVX512) && !defined(DDPM_FAST_EMULATE_AVX512)
#define DDPM_FAST_AVX512_BF16
#endif
#endif
