// Flags of a call as constants of a template.
#pragma once

#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// A bool as a constant, for template arguments.
template <bool kValue>
struct Bool {
  static constexpr bool value = kValue;
};

// body(Bool...) with each of the flags as a constant.
template <typename Body>
DDPM_FAST_INLINE void dispatch(const Body& body) {
  body();
}
template <typename Body, typename... Flags>
DDPM_FAST_INLINE void dispatch(const Body& body, bool flag, Flags... flags) {
  if (flag) {
    dispatch([&](auto... others) DDPM_FAST_LAMBDA { body(Bool<true>{}, others...); }, flags...);
  } else {
    dispatch([&](auto... others) DDPM_FAST_LAMBDA { body(Bool<false>{}, others...); }, flags...);
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
