// What of the pairs runs where: few points on two teams' sums, many on all threads, a batch one item a thread.

#include "mmd_pairs.inl"

// Few points, on one thread or two: the two teams' sums are added in the same order for any number of threads.
template <class T, class Kernel, bool second>
struct Teams {
    using One = Pairs<T, Kernel, second>;
    const MmdArguments<T>& arguments;
    const int threads;
    const int64_t n, m;  // numbers of a gradient
    One first;
    std::unique_ptr<One> other;  // the second thread's own
    Buffer<T> added;

    Teams(const MmdArguments<T>& arguments_, int threads_)
        : arguments(arguments_),
          threads(threads_),
          n(arguments.gx == nullptr ? 0 : arguments.n * arguments.d),
          m(arguments.gy == nullptr ? 0 : arguments.m * arguments.d),
          first(arguments),
          other(threads > 1 ? std::make_unique<One>(arguments) : nullptr),
          added(n + m) {}

    void run(int64_t item) {
        T *gx = arguments.gx + item * n, *gy = arguments.gy + item * m;
        double value[2];
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
        for (int team = 0; team < 2; ++team) {
            One& own = team == 1 && other ? *other : first;
            if (team == 0 || other) own.prepare(item);
            value[team] = own.share(team, team == 0 ? gx : added.data, team == 0 ? gy : added.data + n);
        }
        for (int64_t i = 0; i < n; ++i) gx[i] += added.data[i];
        for (int64_t i = 0; i < m; ++i) gy[i] += added.data[n + i];
        first.write_value(item, value[0] + value[1]);
    }
};

template <class T, class Kernel, bool second>
void mmd_kernel(const MmdArguments<T>& arguments) {
    using All = Pairs<T, Kernel, second>;
    using Few = Teams<T, Kernel, second>;
    const bool few = All::few(arguments);
    if (arguments.batch < arguments.threads || arguments.batch == 1) {
        if (few) {
            // Some ten microseconds of work are not worth waking a thread for.
            const double points = double(arguments.n + arguments.m), work = points * points * double(arguments.d + 16);
            Few teams(arguments, std::min(arguments.threads, work < 1e6 ? 1 : 2));
            for (int64_t item = 0; item < arguments.batch; ++item) teams.run(item);
        } else {
            All pairs(arguments);
            for (int64_t item = 0; item < arguments.batch; ++item) pairs.run(item, arguments.threads);
        }
        return;
    }
    // Made here: an exception must not leave a parallel region.
    std::vector<std::unique_ptr<Few>> teams;
    std::vector<std::unique_ptr<All>> pairs;
    for (int t = 0; t < arguments.threads; ++t)
        few ? teams.push_back(std::make_unique<Few>(arguments, 1)) : pairs.push_back(std::make_unique<All>(arguments));
#pragma omp parallel for num_threads(arguments.threads) schedule(static)
    for (int t = 0; t < arguments.threads; ++t)
        for (int64_t item = t; item < arguments.batch; item += arguments.threads)
            few ? teams[t]->run(item) : pairs[t]->run(item, 1);
}

template <class T, bool second>
void mmd_of(const MmdArguments<T>& arguments) {
    const std::string& kind = arguments.kind;
    if constexpr (!second)
        if (kind == "imq_pairs") return mmd_kernel<T, ImqPairs<T>, second>(arguments);
    if constexpr (!second || sizeof(T) == 8) {  // in float32 the two parts of a root's second derivative would cancel
        if (kind == "laplacian") return mmd_kernel<T, Laplacian<T>, second>(arguments);
        if (kind == "energy") return mmd_kernel<T, Energy<T>, second>(arguments);
    }
    if (kind == "imq") return mmd_kernel<T, ImqSum<T>, second>(arguments);
    if (kind == "rbf") return mmd_kernel<T, Rbf<T>, second>(arguments);
    if (kind == "rational_quadratic") return mmd_kernel<T, RationalQuadratic<T>, second>(arguments);
    if (kind == "polynomial") return mmd_kernel<T, Polynomial<T>, second>(arguments);
    throw std::invalid_argument("mmd: no such kernel: " + kind);
}

template <class T>
void mmd_all(const MmdArguments<T>& arguments) {
    mmd_of<T, false>(arguments);
}

template <class T>
void mmd_second_all(const MmdArguments<T>& arguments) {
    mmd_of<T, true>(arguments);
}

#undef FASTGEN_INLINE
#undef FASTGEN_INLINE_LAMBDA
