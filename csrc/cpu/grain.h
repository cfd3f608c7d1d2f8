// SPDX-License-Identifier: Apache-2.0
// How many tasks a thread is handed at once, so that they are worth the hand-over: a graph of a dozen nodes is one
// thread's work, because others take longer to wake than it takes.
#pragma once

#include <algorithm>
#include <cstdint>

namespace drseg {

// ``work`` of a task: multiplications, or what takes as long.
inline int64_t grain(int64_t work) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, work)); }

}  // namespace drseg
