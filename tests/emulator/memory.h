// SPDX-License-Identifier: Apache-2.0
// Memory whose every access is looked at: inside its bounds, aligned, set before it is read, and in no race. A race is two
// accesses of one place by two threads, one of them a write, that no barrier orders. Places are two bytes wide.
#pragma once

#include <bit>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "block.h"

namespace drseg::emulator {

enum class Access { read, write, atomic };

// What is known of a place: the last write, and of every warp its last read since.
struct Place {
  static constexpr int8_t MANY = -1;
  Time write_time = 0, read_time[MOST_WARPS] = {};
  int16_t writer = -1;
  int8_t reader[MOST_WARPS] = {};  // the lane, or MANY
  bool atomic = false, in_flight = false;
  unsigned written_in = 0;  // number of the block, from 1; 0 for never
  Where write_at, read_at;
};

inline void race(const char* kind, size_t place, const char* now, const char* then, const Where& then_at, int other,
                 const Where& where) {
  block().fault(std::string("race on ") + kind + " memory, place " + std::to_string(place) + ": " + now + " beside a " +
                    then + " at " + at(then_at) + " by thread " + std::to_string(other),
                where);
}

// Notes an access and finds a race with earlier ones.
inline void note(Place& place, const char* kind, size_t number, Access access, const Where& where) {
  Block& own = block();
  const bool writes = access != Access::read;
  const char* now = writes ? "a write" : "a read";
  if (place.writer >= 0 && !(place.atomic && access == Access::atomic) && !own.before(place.writer, place.write_time))
    race(kind, number, now, "write", place.write_at, place.writer, where);
  if (!writes) {
    const int w = own.me / LANES;
    const auto lane = int8_t(own.me % LANES);
    const bool again = place.read_time[w] == own.warp().time;
    place.reader[w] = !again || place.reader[w] == lane ? lane : Place::MANY;
    place.read_time[w] = own.warp().time;
    place.read_at = where;
    return;
  }
  for (unsigned w = 0; w < own.size() / LANES; ++w) {
    const Time time = place.read_time[w];
    if (time == 0) continue;
    // of several lanes one is another thread than this
    const int lane = place.reader[w] == Place::MANY ? (own.me % LANES + 1) % LANES : place.reader[w];
    if (!own.before(int(w) * LANES + lane, time))
      race(kind, number, now, "read", place.read_at, int(w) * LANES + lane, where);
    place.read_time[w] = 0;
  }
  place.writer = int16_t(own.me);
  place.write_time = own.warp().time;
  place.write_at = where;
  place.atomic = access == Access::atomic;
}

// The memory of the launch that is under way.
struct Arena {
  std::vector<unsigned char> bytes;
  std::vector<Place> places;
  // a place that some block wrote, and which
  struct Written {
    Place place;
    unsigned block;
  };
  std::unordered_map<const void*, Written> global;
  // where the first and the last of them lie
  uintptr_t lowest = ~uintptr_t(0), highest = 0;
  bool checks = true;

  unsigned char* start() { return bytes.data() + (-reinterpret_cast<uintptr_t>(bytes.data()) & 127); }
  size_t size() const { return bytes.size() - 128; }

  static Arena*& current() {
    static thread_local Arena* arena = nullptr;
    return arena;
  }
};

inline Arena& arena() { return *Arena::current(); }

inline void touch_shared(const void* from, size_t bytes, Access access, const Where& where) {
  if (!arena().checks) return;
  const size_t first = size_t(static_cast<const unsigned char*>(from) - arena().start()) / 2;
  for (size_t n = first; n < first + bytes / 2; ++n) {
    Place& place = arena().places[n];
    if (place.in_flight) block().fault("shared memory is used before a copy to it was waited for", where);
    if (access != Access::write && place.written_in != block().number)
      block().fault("shared memory is read before it is written", where);
    note(place, "shared", n, access, where);
    place.written_in = block().number;
  }
}

inline void touch_global(const void* from, size_t bytes, Access access, const Where& where) {
  if (!arena().checks) return;
  auto& known = arena().global;
  const auto start = reinterpret_cast<uintptr_t>(from);
  if (access == Access::read) {
    if (start + bytes <= arena().lowest || start > arena().highest) return;
  } else {
    arena().lowest = std::min(arena().lowest, start);
    arena().highest = std::max(arena().highest, start + bytes);
  }
  for (size_t n = 0; n < bytes; n += 2) {
    const void* place = static_cast<const char*>(from) + n;
    auto found = known.find(place);
    if (found == known.end()) {
      if (access == Access::read) continue;
      found = known.try_emplace(place, Arena::Written{{}, block().number}).first;
    }
    auto& [what, owner] = found->second;
    if (owner != block().number && !(what.atomic && access == Access::atomic))
      block().fault(std::string("race on global memory: ") + (access == Access::read ? "read" : "written") +
                        " by two blocks, first at " + at(what.write_at),
                    where);
    note(what, "global", n, access, where);
  }
}

template <class T>
concept Element = std::is_trivially_copyable_v<T> && sizeof(T) % 2 == 0 && sizeof(T) <= 16;

struct GlobalMemory {
  static constexpr const char* NAME = "global";
  static constexpr auto touch = touch_global;
};
struct SharedMemory {
  static constexpr const char* NAME = "shared";
  static constexpr auto touch = touch_shared;
};

// Elements of one memory, and all that a kernel may do with them.
template <class T, class Memory>
class View {
 public:
  using Value = std::remove_const_t<T>;
  static_assert(Element<Value>);

  View(T* start, int64_t size) : start_(start), size_(size) {}

  Value get(int64_t i, Where where = Where::current()) const { return get_as<Value>(i, where); }
  void set(int64_t i, Value value, Where where = Where::current()) const { set_as(i, value, where); }
  // All of a V at once; the first element must lie where a V may.
  template <class V>
  V get_as(int64_t i, Where where = Where::current()) const {
    const T* from = address(i, sizeof(V) / sizeof(T), sizeof(V), where);
    Memory::touch(from, sizeof(V), Access::read, where);
    V value;
    std::memcpy(&value, from, sizeof(V));
    return value;
  }
  template <class V>
  void set_as(int64_t i, V value, Where where = Where::current()) const {
    T* to = address(i, sizeof(V) / sizeof(T), sizeof(V), where);
    Memory::touch(to, sizeof(V), Access::write, where);
    std::memcpy(to, &value, sizeof(V));
  }
  // Returns what was there. Of integers, whose sums have no order.
  Value add(int64_t i, Value value, Where where = Where::current()) const {
    static_assert(std::is_integral_v<Value>);
    T* to = address(i, 1, sizeof(T), where);
    Memory::touch(to, sizeof(T), Access::atomic, where);
    return std::exchange(*to, Value(*to + value));
  }
  // Where `count` elements from `i` on lie, which must be within bounds and aligned to `bytes`.
  T* address(int64_t i, int64_t count, size_t bytes, const Where& where) const {
    if (i < 0 || i + count > size_)
      block().fault(std::string(Memory::NAME) + " memory out of bounds: element " + std::to_string(i) +
                        (count > 1 ? " and on" : "") + " of " + std::to_string(size_),
                    where);
    if (reinterpret_cast<uintptr_t>(start_ + i) % bytes)
      block().fault(std::string(Memory::NAME) + " memory is not aligned to " + std::to_string(bytes) +
                        " bytes: element " + std::to_string(i),
                    where);
    return start_ + i;
  }

 protected:
  T* start_;
  int64_t size_;
};

}  // namespace drseg::emulator
