// SPDX-License-Identifier: Apache-2.0
// A block of threads, each a fiber, one after another in an order that a seed decides: barriers, collectives of a warp,
// and who knows of whose accesses. The first fault ends the launch.
//
// DRSEG_EMULATOR_SEED chooses the order (1), DRSEG_EMULATOR_CHECK=0 leaves out the checks of memory.
#pragma once

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

namespace drseg::emulator {

using Where = std::source_location;
using Time = uint32_t;

constexpr int LANES = 32, MOST_WARPS = 32;

struct Index3 {
  unsigned x = 1, y = 1, z = 1;
};

inline std::string at(const Where& where) {
  const std::string path = where.file_name();
  return path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(where.line());
}

// What a warp knows: of every warp, the time up to which that one's accesses lie before whatever it does next.
using Clock = std::array<Time, MOST_WARPS>;

inline void join(Clock& clock, const Clock& other) {
  for (int w = 0; w < MOST_WARPS; ++w) clock[w] = std::max(clock[w], other[w]);
}

// A copy that is under way until its thread waits for it.
struct Copy {
  void* to;
  const void* from;  // or nullptr, for zeros
  Where where;
};

// Where threads wait; they go on when the generation changes.
struct Gate {
  unsigned arrived = 0, generation = 0;
  Where where;
  const char* what = "";
};

struct Thread {
  Fiber fiber;
  bool done = false;
  const Gate* gate = nullptr;
  unsigned seen = 0;
  Where where;
  const char* what = "";
  // groups of copies; the last is open
  std::vector<std::vector<Copy>> copies;
};

struct Warp : Gate {
  Clock clock{};
  Time time = 0;
  alignas(16) unsigned char given[2][LANES][64];
};

struct NamedBarrier : Gate {
  std::array<bool, MOST_WARPS> warps{};
  unsigned threads = 0;
};

struct MemoryBarrier : Gate {
  unsigned expected = 0, phase = 0;
  Clock arriving{}, completed{};
};

class Block {
 public:
  Block(Index3 grid, unsigned threads, unsigned seed, void (*body)(void*), void* argument)
      : grid(grid), random_(seed), body_(body), argument_(argument), threads_(threads), warps_(threads / LANES) {}

  Index3 index, grid;
  unsigned number = 0;
  int me = 0;

  unsigned size() const { return unsigned(threads_.size()); }
  Thread& thread() { return threads_[me]; }
  int warp_of(int thread) const { return thread / LANES; }
  Warp& warp() { return warps_[me / LANES]; }
  const Warp& warp(int w) const { return warps_[w]; }

  // Whether what a thread did at that time lies before what this one does now.
  bool before(int other, Time time) const {
    const int v = other / LANES, w = me / LANES;
    if (v == w) return other == me || time != warps_[w].time;
    return time <= warps_[w].clock[v];
  }

  std::string name(int thread) const {
    return "block " + std::to_string(index.x) + "," + std::to_string(index.y) + " thread " + std::to_string(thread);
  }

  [[noreturn]] void fault(const std::string& text, const Where& where) {
    fault_ = "emulator: " + text + " at " + at(where) + " by " + name(me);
    threads_[me].fiber.stop();
    std::abort();
  }

  void wait(const Gate& gate, const char* what, const Where& where) {
    Thread& own = threads_[me];
    own.gate = &gate;
    own.seen = gate.generation;
    own.what = what;
    own.where = where;
    own.fiber.stop();
  }

  // Whether this thread is the last of so many. Threads may not come to one gate from two places.
  bool arrives(Gate& gate, unsigned all, const char* what, const Where& where) {
    if (gate.arrived == 0) {
      gate.where = where;
      gate.what = what;
    } else if (gate.what != what || gate.where.line() != where.line() ||
               std::strcmp(gate.where.file_name(), where.file_name()) != 0) {
      fault(std::string("threads diverge: ") + what + ", where others are in " + gate.what + " of " + at(gate.where),
            where);
    }
    if (++gate.arrived < all) return false;
    gate.arrived = 0;
    ++gate.generation;
    return true;
  }

  void sync_block(const Where& where) {
    constexpr const char* what = "sync_block";
    for (unsigned t = 0; t < size(); ++t)
      if (threads_[t].done) fault("divergent barrier: " + name(int(t)) + " has left the kernel", where);
    if (arrives(whole_, size(), what, where)) {
      Clock now{};
      for (size_t v = 0; v < warps_.size(); ++v) now[v] = warps_[v].time;
      for (Warp& each : warps_) {
        each.clock = now;
        each.time = ++ticks_;
      }
    } else {
      wait(whole_, what, where);
    }
  }

  void sync_named(int id, unsigned threads, const Where& where) {
    constexpr const char* what = "sync_named";
    if (id < 1 || id > 15 || threads == 0 || threads % LANES || threads > size())
      fault("named barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads", where);
    NamedBarrier& gate = named_[id];
    if (gate.arrived == 0) gate.threads = threads;
    if (gate.threads != threads) fault("threads expect different numbers at a named barrier", where);
    gate.warps[me / LANES] = true;
    if (!arrives(gate, threads, what, where)) return wait(gate, what, where);
    Clock now{};
    for (size_t w = 0; w < warps_.size(); ++w)
      if (gate.warps[w]) {
        join(now, warps_[w].clock);
        now[w] = warps_[w].time;
      }
    for (size_t w = 0; w < warps_.size(); ++w)
      if (gate.warps[w]) {
        warps_[w].clock = now;
        warps_[w].time = ++ticks_;
      }
    gate.warps.fill(false);
  }

  // What `read(value_of_lane)` makes of what all lanes give. It orders no memory; `sync_warp` does.
  template <class T, class Read>
  auto collective(const char* what, const T& mine, const Where& where, Read read) {
    static_assert(sizeof(T) <= sizeof(Warp::given[0][0]) && std::is_trivially_copyable_v<T>);
    Warp& own = warp();
    const unsigned side = own.generation & 1;
    std::memcpy(own.given[side][me % LANES], &mine, sizeof(T));
    if (!arrives(own, LANES, what, where)) wait(own, what, where);
    return read([&own, side](int lane) -> const T& { return *reinterpret_cast<const T*>(own.given[side][lane]); });
  }

  void sync_warp(const Where& where) {
    Warp& own = warp();
    if (arrives(own, LANES, "sync_warp", where))
      own.time = ++ticks_;
    else
      wait(own, "sync_warp", where);
  }

  MemoryBarrier& memory_barrier(const void* place) { return barriers_[place]; }

  void arrive(MemoryBarrier& barrier, const Where& where) {
    if (barrier.expected == 0) fault("a memory barrier is used before it is set up", where);
    join(barrier.arriving, warp().clock);
    barrier.arriving[me / LANES] = warp().time;
    if (++barrier.arrived < barrier.expected) return;
    barrier.completed = barrier.arriving;
    barrier.arrived = 0;
    barrier.phase ^= 1;
    ++barrier.generation;
  }

  void wait_for(MemoryBarrier& barrier, unsigned parity, const Where& where) {
    if (barrier.expected == 0) fault("a memory barrier is used before it is set up", where);
    while (barrier.phase == (parity & 1)) wait(barrier, "a memory barrier", where);
    join(warp().clock, barrier.completed);
  }

  // Runs the block that `index` and `number` name.
  void run() {
    barriers_.clear();
    for (Warp& each : warps_) {
      each.clock.fill(ticks_);
      each.arrived = 0;
    }
    for (Warp& each : warps_) each.time = ++ticks_;
    whole_.arrived = 0;
    for (NamedBarrier& each : named_) each.arrived = 0;
    for (Thread& each : threads_) {
      each.done = false;
      each.gate = nullptr;
      each.copies.assign(1, {});
      each.fiber.start(&enter);
    }
    current() = this;
    unsigned left = size();
    std::vector<unsigned> order(size());
    std::iota(order.begin(), order.end(), 0u);
    while (left) {
      std::shuffle(order.begin(), order.end(), random_);
      bool moved = false;
      for (unsigned t : order) {
        Thread& each = threads_[t];
        if (each.done || (each.gate && each.gate->generation == each.seen)) continue;
        each.gate = nullptr;
        me = int(t);
        moved = true;
        each.fiber.go_on();
        if (!fault_.empty()) throw std::runtime_error(fault_);
        left -= each.done;
      }
      if (!moved) throw std::runtime_error(stuck());
    }
    current() = nullptr;
  }

  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }

  std::minstd_rand& random() { return random_; }

 private:
  static void enter() {
    Block& block = *current();
    block.body_(block.argument_);
    Thread& own = block.threads_[block.me];
    for (const auto& group : own.copies)
      if (!group.empty()) block.fault("a thread leaves before its copies were waited for", group.front().where);
    own.done = true;
    own.fiber.stop();
    std::abort();
  }

  std::string stuck() const {
    std::string text = "emulator: deadlock in block " + std::to_string(index.x) + "," + std::to_string(index.y) + ":";
    std::map<std::string, std::pair<unsigned, unsigned>> waiting;  // first and number
    for (unsigned t = 0; t < size(); ++t) {
      const Thread& each = threads_[t];
      const std::string what = each.done ? "has left" : std::string("in ") + each.what + " of " + at(each.where);
      ++waiting.try_emplace(what, t, 0).first->second.second;
    }
    for (const auto& [what, threads] : waiting)
      text += " " + std::to_string(threads.second) + " threads (first " + std::to_string(threads.first) + ") " + what + ";";
    text.back() = '.';
    return text;
  }

  std::minstd_rand random_;
  void (*body_)(void*);
  void* argument_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Gate whole_;
  std::array<NamedBarrier, 16> named_;
  std::map<const void*, MemoryBarrier> barriers_;
  Time ticks_ = 0;
  std::string fault_;
};

inline Block& block() { return *Block::current(); }

}  // namespace drseg::emulator
