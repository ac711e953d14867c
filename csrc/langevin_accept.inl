// The end of a MALA step, and the raw words of the stream. fastgen/reference/langevin_mala.py has the formula.

// Σ q², Σ q·ε and Σ (y − x)(y + x), where q = d(x) + d(y) and d is the drift.
template <bool PRIOR, class Real>
static void accept_sums(const Real* x, const Real* grad, const Real* y, const Real* y_grad, const float* noise,
                        int64_t count, const Scalars<Real>& k, double* sums) {
    double qq[SUMS] = {}, qe[SUMS] = {}, yx[SUMS] = {};
    const auto add = [&](int64_t i, int j) {
        const double q = double(drift<PRIOR>(x[i], grad[i], k)) + double(drift<PRIOR>(y[i], y_grad[i], k));
        qq[j] += q * q;
        qe[j] += q * double(noise[i]);
        if (PRIOR) yx[j] += (double(y[i]) - double(x[i])) * (double(y[i]) + double(x[i]));
    };
    int64_t i = 0;
    for (; i + SUMS <= count; i += SUMS)
        for (int j = 0; j < SUMS; ++j) add(i + j, j);
    for (int j = 0; i + j < count; ++j) add(i + j, j);
    sums[0] = total(qq), sums[1] = total(qe), sums[2] = total(yx);
}

template <class Real>
static void accept(const LangevinAccept& a) {
    const LangevinStep& s = a.s;
    Real *x = static_cast<Real*>(s.x), *grad = static_cast<Real*>(const_cast<void*>(s.grad));
    const Real *y = static_cast<const Real*>(a.proposal), *y_grad = static_cast<const Real*>(a.proposal_grad);
    Scalars<Real> k{};
    k.precision = Real(s.precision), k.clip = Real(s.grad_clip);
    const int64_t pieces = pieces_of(s);
    double* sums = static_cast<double*>(std::malloc(s.chains * pieces * 3 * sizeof(double)));
    partition(s, true, [&](int64_t chain, int64_t chains, int64_t piece, int64_t first, int64_t count, const float* noise) {
        for (int64_t c = 0; c < chains; ++c) {
            const int64_t at = (chain + c) * s.elements + first;
            double* out = sums + 3 * ((chain + c) * pieces + piece);
            const auto of = s.precision != 0 ? accept_sums<true, Real> : accept_sums<false, Real>;
            of(x + at, grad + at, y + at, y_grad + at, noise + c * count, count, k, out);
        }
    });
    const Keys keys(s.seed);
    for (int64_t chain = 0; chain < s.chains; ++chain) {
        double qq = 0, qe = 0, yx = 0;
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const double* t = sums + 3 * (chain * pieces + piece);
            qq += t[0], qe += t[1], yx += t[2];
        }
        const double h = s.step_sizes ? static_cast<const Real*>(s.step_sizes)[chain] : Real(s.step_size);
        const double scale = s.noise_scales ? static_cast<const Real*>(s.noise_scales)[chain] : Real(s.noise_scale);
        const double beta = 2 * h / (scale * scale), after = a.proposal_energy[chain];
        const double rise = after - a.energy[chain] + 0.5 * double(k.precision) * yx;
        double log_alpha = h / scale * qe - beta * (rise + 0.25 * h * qq);
        constexpr double inf = std::numeric_limits<double>::infinity();
        if (after == inf) log_alpha = -inf;  // outside the support, whatever the gradient says
        if (after == -inf) log_alpha = std::numeric_limits<double>::quiet_NaN();
        const uint64_t id = s.chain_id ? s.chain_id[chain] : chain;
        u32v c[1][4] = {{u32v{}, u32v{} + a.accept_step, u32v{} + uint32_t(id), u32v{} + uint32_t(id >> 32)}};
        philox(c, keys);
        a.log_alpha[chain] = log_alpha;
        a.accepted[chain] = std::log((double(c[0][0][0]) + 0.5) * 0x1p-32) < log_alpha;
    }
    std::free(sums);
#pragma omp parallel for schedule(static) num_threads(s.threads) if (s.chains * s.elements > 32768)
    for (int64_t task = 0; task < s.chains * pieces; ++task) {
        const int64_t chain = task / pieces, first = task % pieces * BLOCK, at = chain * s.elements + first;
        if (!a.accepted[chain]) continue;
        const size_t bytes = std::min(BLOCK, s.elements - first) * sizeof(Real);
        std::memcpy(x + at, y + at, bytes);
        std::memcpy(grad + at, y_grad + at, bytes);
    }
}

void langevin_accept(const LangevinAccept& a) {
    if (a.s.type == Type::float64)
        accept<double>(a);
    else
        accept<float>(a);
}

// [chains, elements] words in the order of the normals; s.x is uint32.
void langevin_words(const LangevinStep& s) {
    const Keys keys(s.seed);
    uint32_t* out = static_cast<uint32_t*>(s.x);
    const int64_t groups = (s.elements + 3) / 4, total = s.chains * groups;
#pragma omp parallel for schedule(static) num_threads(s.threads) if (total > 8192)
    for (int64_t first = 0; first < total; first += LANES) {
        alignas(VEC_BYTES) uint32_t lane[4][LANES] = {};
        const int count = int(std::min<int64_t>(LANES, total - first));
        for (int i = 0; i < count; ++i) {
            const int64_t chain = (first + i) / groups;
            const uint64_t id = s.chain_id ? s.chain_id[chain] : chain;
            lane[0][i] = uint32_t((first + i) % groups), lane[1][i] = s.step;
            lane[2][i] = uint32_t(id), lane[3][i] = uint32_t(id >> 32);
        }
        u32v c[1][4];
        std::memcpy(c, lane, sizeof c);
        philox(c, keys);
        std::memcpy(lane, c, sizeof c);
        for (int i = 0; i < count; ++i) {
            const int64_t chain = (first + i) / groups, at = (first + i) % groups * 4;
            for (int64_t j = 0; j < std::min<int64_t>(4, s.elements - at); ++j) out[chain * s.elements + at + j] = lane[j][i];
        }
    }
}
