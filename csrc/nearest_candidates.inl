// The candidates that a search has for its queries: kept by their keys, thinned out by the limit, decided by their direct
// distances; nearest.cpp has the plan and the proof.

constexpr int32_t NEVER = std::numeric_limits<int32_t>::min(), ALWAYS = std::numeric_limits<int32_t>::max() - 1;

int32_t bits(float x) {
    int32_t same;
    std::memcpy(&same, &x, sizeof same);
    return same;
}

template <class T>
struct Aligned {  // uninitialised, on cache lines
    T* data;
    explicit Aligned(int64_t n)
        : data(static_cast<T*>(::operator new(size_t(std::max<int64_t>(n, 1)) * sizeof(T), std::align_val_t(64)))) {
        large_pages(data, n * int64_t(sizeof(T)));
    }
    Aligned(const Aligned&) = delete;
    Aligned(Aligned&& other) noexcept : data(other.data) { other.data = nullptr; }
    ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
    operator T*() const { return data; }
};

struct Candidate {
    int32_t key;
    int64_t row;
};

// The queries that a thread works on: limits, candidates, and the best so far among those measured.
struct Group {
    const NearestProblem& problem;
    const int64_t* query_rows = nullptr;
    int64_t size = 0, capacity;
    int32_t least = NEVER;  // of a limit
    Aligned<int32_t> packed, limit, near;
    Aligned<double> error, unit, norm;  // E, 2st (0: keys are bits) and ‖q'‖² of each query
    Aligned<int64_t> count;
    Aligned<Candidate> list;
    Aligned<int16_t> line;
    int64_t* measured;  // how many of its k each query has, indexed by query

    Group(const NearestProblem& problem, int64_t rows, int64_t pairs, int64_t* measured)
        : problem(problem), capacity(std::max<int64_t>(64, 4 * problem.k)), packed(rows * pairs), limit(rows), near(rows),
          error(rows), unit(rows), norm(rows), count(rows), list(rows * capacity), line(2 * pairs), measured(measured) {
        std::fill(packed + 0, packed + rows * pairs, 0);
    }

    // `keys` of some `rows` of the database, 32 at most, some of them at or below the limit.
    void take(int64_t slot, const int32_t* keys, const int64_t* rows, int64_t columns) {
        const uint8_t* mask = problem.mask_stride ? problem.mask + query_rows[slot] * problem.mask_stride : nullptr;
        const int32_t within_reach = near[slot];
        if (problem.k == 1) {
            int32_t best = std::numeric_limits<int32_t>::max();
            if (mask == nullptr)  // apart, for the compiler to do many at once
                for (int64_t c = 0; c < columns; ++c) best = std::min(best, keys[c] > within_reach ? keys[c] : best);
            else
                for (int64_t c = 0; c < columns; ++c)
                    if (keys[c] < best && keys[c] > within_reach && mask[rows[c]]) best = keys[c];
            lower(slot, best + 2 * error[slot]);
        }
        const int32_t most = limit[slot];
        uint32_t taken = 0;
        for (int64_t c = 0; c < columns; ++c) taken |= uint32_t(keys[c] <= most) << c;
        for (; taken; taken &= taken - 1) {
            const int c = __builtin_ctz(taken);
            if (mask && !mask[rows[c]]) continue;
            // A row that is rejected already is no answer, nor has it lowered the limit. Leaving it out saves time alone:
            // taken, it would be rejected again by its distance, or stand among the best until k nearer ones were found;
            // where they are not, the caller searches anew. A limit that it set meanwhile held for those k as well.
            if (keys[c] <= within_reach && __atomic_load_n(problem.rejected + rows[c], __ATOMIC_RELAXED)) continue;
            if (count[slot] == capacity) prune(slot);
            list[slot * capacity + count[slot]++] = {keys[c], rows[c]};
        }
    }

    void lower(int64_t slot, double key) {
        if (key < limit[slot]) limit[slot] = std::max({near[slot], least, int32_t(std::ceil(std::max(key, double(NEVER))))});
    }

    void prune(int64_t slot) {
        Candidate *begin = list + slot * capacity, *end = begin + count[slot];
        Candidate* far = std::partition(begin, end, [&](const Candidate& one) { return one.key <= near[slot]; });
        if (end - far >= problem.k) {
            Candidate* last = far + problem.k - 1;
            std::nth_element(far, last, end, [](const Candidate& a, const Candidate& b) { return a.key < b.key; });
            lower(slot, last->key + 2 * error[slot]);
        }
        end = std::remove_if(begin, end, [&](const Candidate& one) { return one.key > limit[slot]; });
        count[slot] = end - begin;
        if (2 * count[slot] > capacity) measure(slot);
    }

    // Replaces the candidates by their direct distances, of which the k smallest (distance, row) are kept.
    void measure(int64_t slot) { problem.is_double ? measure_as<double>(slot) : measure_as<float>(slot); }

    template <class T>
    void measure_as(int64_t slot) {
        const int64_t query = query_rows[slot], k = problem.k, d = problem.d;
        const T *q = static_cast<const T*>(problem.query) + query * d, *b = static_cast<const T*>(problem.database);
        float* distance = problem.distance + query * k;
        int64_t *index = problem.index + query * k, &have = measured[query];
        for (int64_t i = 0; i < count[slot]; ++i) {
            const Candidate& one = list[slot * capacity + i];
            if (one.key > limit[slot]) continue;
            const float found = direct(q, b + one.row * d, d);
            if (problem.rejected && found < problem.reach) {
                __atomic_store_n(problem.rejected + one.row, 1, __ATOMIC_RELAXED);
                continue;
            }
            auto after = [&](int64_t j) { return found < distance[j] || (found == distance[j] && one.row < index[j]); };
            if (have == k && !after(k - 1)) continue;
            int64_t j = have < k ? have++ : k - 1;
            for (; j > 0 && after(j - 1); --j) distance[j] = distance[j - 1], index[j] = index[j - 1];
            distance[j] = found, index[j] = one.row;
        }
        count[slot] = 0;
        limit_by_measured(slot);
    }

    void limit_by_measured(int64_t slot) {
        const int64_t query = query_rows[slot], k = problem.k;
        if (measured[query] < k) return;
        const float last = problem.distance[query * k + k - 1];
        // E holds room for what float32 rounding of a distance hides.
        lower(slot, (unit[slot] > 0 ? (double(last) - norm[slot]) / unit[slot] : bits(last)) + error[slot]);
    }
};
