// A fiber: a stack of its own, switched to and from by the thread that made it. x86-64, System V.
//
// AddressSanitizer is told of every switch. ThreadSanitizer takes each fiber for a thread and learns of no order from a
// switch itself: only barriers and collectives order fibers, so that it reports whichever of them is missing.
#pragma once

#include <sys/mman.h>

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#define SIMT_UNCHECKED __attribute__((no_sanitize("thread"), noinline))
#else
#define SIMT_UNCHECKED
#endif

extern "C" void simt_switch(void** from, void* to);
asm(R"(
.pushsection .text.simt_switch,"axG",@progbits,simt_switch,comdat
.weak simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
.popsection
)");

namespace simt {

/// While it lives, ThreadSanitizer looks away: what the emulator does for itself is no access of the kernel's.
struct Unobserved {
#if defined(__SANITIZE_THREAD__)
  Unobserved() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unobserved() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  Unobserved() {}
  ~Unobserved() {}
#endif
};

/// Orders what is before a release of an address before what is after an acquire of it.
inline void release([[maybe_unused]] void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(address);
#endif
}

inline void acquire([[maybe_unused]] void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(address);
#endif
}

class Stack {
 public:
  static constexpr size_t size = 256 * 1024;
  Stack()
      : base_(static_cast<char*>(
            mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {}
  ~Stack() { munmap(base_, size); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  char* base() const { return base_; }
  char* top() const { return base_ + size; }

 private:
  char* base_;
};

/// Where the main fiber, or one that runs a CUDA thread, stands while another runs.
struct Context {
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;  // of AddressSanitizer
  const void* bottom = nullptr;
  size_t size = 0;
  void* thread = nullptr;  // of ThreadSanitizer

  /// Make the next switch to this start `entry` on the stack.
  void start_at(void (*entry)(), const Stack& stack) {
    void** top = reinterpret_cast<void**>(stack.top());
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    *this = Context{top, nullptr, stack.base(), Stack::size, nullptr};
#if defined(__SANITIZE_THREAD__)
    thread = __tsan_create_fiber(0);
#endif
  }

  void destroy() {
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(thread);
#endif
  }
};

/// Stop here, go on there. `last` says that this one will not be returned to.
SIMT_UNCHECKED inline void switch_fibers(Context& here, Context& there, [[maybe_unused]] bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &here.fake_stack, there.bottom, there.size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(there.thread, 1);
#endif
  simt_switch(&here.stack_pointer, there.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(here.fake_stack, nullptr, nullptr);
#endif
}

}  // namespace simt
