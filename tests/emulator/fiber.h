// SPDX-License-Identifier: Apache-2.0
// A function with a stack of its own, which stops where it asks to and goes on from there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if !defined(__x86_64__) && !defined(DRSEG_EMULATOR_UCONTEXT)
#define DRSEG_EMULATOR_UCONTEXT
#endif
#ifdef DRSEG_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace drseg::emulator {

#ifndef DRSEG_EMULATOR_UCONTEXT
// Saves what a callee keeps, changes the stack, and takes up what was saved there: a tenth of swapcontext's time, which
// asks the system for its signals.
[[gnu::naked, gnu::noinline]] inline void change_stack(void** from, void* to) {
  asm("push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n ret\n");
}
#endif

class Fiber {
 public:
  static constexpr size_t STACK = 64 << 10;

  // `entry` must not return: it stops for good.
  void start(void (*entry)()) {
    if (!stack_) stack_ = std::make_unique<char[]>(STACK);
#ifdef DRSEG_EMULATOR_UCONTEXT
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_.get();
    own_.uc_stack.ss_size = STACK;
    own_.uc_link = nullptr;
    makecontext(&own_, entry, 0);
#else
    // as a call leaves it: the place to return to on a stack that is a multiple of 16 before it
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack_.get()) + STACK) & ~uintptr_t(15));
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int n = 0; n < 6; ++n) *--top = nullptr;
    own_ = top;
#endif
  }

  void go_on() {
#ifdef DRSEG_EMULATOR_UCONTEXT
    swapcontext(&caller_, &own_);
#else
    change_stack(&caller_, own_);
#endif
  }

  void stop() {
#ifdef DRSEG_EMULATOR_UCONTEXT
    swapcontext(&own_, &caller_);
#else
    change_stack(&own_, caller_);
#endif
  }

 private:
#ifdef DRSEG_EMULATOR_UCONTEXT
  ucontext_t own_, caller_;
#else
  void *own_ = nullptr, *caller_ = nullptr;
#endif
  std::unique_ptr<char[]> stack_;
};

}  // namespace drseg::emulator
