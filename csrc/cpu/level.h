// SPDX-License-Identifier: Apache-2.0
// The instruction set is chosen when the program runs, never by the machine that built it.
//
// A kernel body is an always_inline template; DRSEG_LEVELS stamps one function per instruction set from it, and
// DRSEG_CALL picks one. DRSEG_CPU_LEVEL=plain|avx2|avxvnni|avx512 forces a lower one, so that each can be
// tested anywhere; avxvnni is avx2 with 8-bit products, which only coarse.cpp has a use for.
#pragma once

#include <cstdlib>
#include <cstring>

#define DRSEG_INLINE inline __attribute__((always_inline))

namespace drseg {

enum class Level { plain, avx2, avx512 };

inline bool forced_level(const char* name) {
  const char* forced = std::getenv("DRSEG_CPU_LEVEL");
  return forced != nullptr && std::strcmp(forced, name) == 0;
}

inline Level detect_level() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (forced_level("plain")) return Level::plain;
  if ((forced_level("avx2") || forced_level("avxvnni")) && avx2) return Level::avx2;
  return avx512 ? Level::avx512 : (avx2 ? Level::avx2 : Level::plain);
#else
  return Level::plain;
#endif
}

inline Level level() {
  static const Level value = detect_level();
  return value;
}

}  // namespace drseg

// body<T, bytes>: bytes is the width of the level's vector registers
#if defined(__x86_64__)
#define DRSEG_LEVELS(name, body)                                                                       \
  template <class T, class... A>                                                                       \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512"))) void  \
  name##_avx512(A... a) { body<T, 64>(a...); }                                                         \
  template <class T, class... A>                                                                       \
  __attribute__((target("avx2,fma"))) void name##_avx2(A... a) { body<T, 32>(a...); }                  \
  template <class T, class... A>                                                                       \
  void name##_plain(A... a) { body<T, 16>(a...); }
#define DRSEG_CALL(name, T, ...)                                   \
  switch (::drseg::level()) {                                      \
    case ::drseg::Level::avx512: name##_avx512<T>(__VA_ARGS__); break; \
    case ::drseg::Level::avx2: name##_avx2<T>(__VA_ARGS__); break;     \
    default: name##_plain<T>(__VA_ARGS__);                         \
  }
#else
#define DRSEG_LEVELS(name, body) \
  template <class T, class... A> \
  void name##_plain(A... a) { body<T, 16>(a...); }
#define DRSEG_CALL(name, T, ...) name##_plain<T>(__VA_ARGS__)
#endif
