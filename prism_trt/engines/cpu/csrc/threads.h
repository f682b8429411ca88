// A fixed team of threads that runs one function at a time, with a spin barrier inside it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include <sched.h>

#include "simd.h"

namespace prism {

class Team {
public:
    explicit Team(int size) : size_(size) {
        for (int id = 1; id < size; ++id) workers_.emplace_back([this, id] { work(id); });
    }

    ~Team() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
            generation_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }

    // Call function(id) on every thread of the team, the caller being thread 0, and return when all are done.
    void run(const std::function<void(int)>& function) {
        function_ = &function;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            generation_.fetch_add(1, std::memory_order_release);
        }
        if (sleepers_.load(std::memory_order_acquire) > 0) wake_.notify_all();
        function(0);
        barrier();
    }

    // Wait until every thread of the team has arrived.
    void barrier() {
        if (size_ == 1) return;
        const unsigned phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (unsigned spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
            if (spins < kSpinsBeforeYield) pause_cpu();
            else sched_yield();  // another process holds the core of the thread we wait for
        }
    }

private:
    // About 0.5 ms. Yielding sooner hands the core to a busy neighbour for a whole time slice at every barrier, which
    // costs far more than spinning; later, two threads of the team that landed on one core would starve each other.
    static constexpr unsigned kSpinsBeforeYield = 50000;
    // About 1 ms: longer than the host code between two calls of a decoding loop.
    static constexpr unsigned kSpinsBeforeSleep = 100000;

    void work(int id) {
        unsigned seen = 0;
        for (;;) {
            unsigned spins = 0;
            while (generation_.load(std::memory_order_acquire) == seen) {
                if (++spins < kSpinsBeforeSleep) {
                    pause_cpu();
                    continue;
                }
                std::unique_lock<std::mutex> lock(mutex_);
                sleepers_.fetch_add(1, std::memory_order_acq_rel);
                wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
                sleepers_.fetch_sub(1, std::memory_order_acq_rel);
            }
            ++seen;
            if (stop_) return;
            (*function_)(id);
            barrier();
        }
    }

    const int size_;
    std::vector<std::thread> workers_;
    const std::function<void(int)>* function_ = nullptr;
    std::atomic<unsigned> generation_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<int> arrived_{0};
    std::atomic<unsigned> phase_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
    bool stop_ = false;
};

// The share of `count` items that belongs to thread `id` of `size`: [first, last).
struct Share {
    int first, last;
    Share(int count, int id, int size) : first(int(int64_t(count) * id / size)), last(int(int64_t(count) * (id + 1) / size)) {}
};

}  // namespace prism
