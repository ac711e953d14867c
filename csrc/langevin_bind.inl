void bind_langevin(py::module_& m) {
    using namespace fastgen;
    py::class_<LangevinStep>(m, "LangevinStep")
        .def(py::init([](uintptr_t x, uintptr_t grad, uintptr_t lookahead, uintptr_t stats, uintptr_t chain_id,
                         uintptr_t step_sizes, uintptr_t noise_scales, int64_t chains, int64_t elements, double step_size,
                         double noise_scale, double precision, double grad_clip, double low, double high,
                         double lookahead_size, bool noise_first, uint64_t seed, uint32_t step, int type, int threads) {
            return LangevinStep{reinterpret_cast<void*>(x),
                                reinterpret_cast<const void*>(grad),
                                reinterpret_cast<void*>(lookahead),
                                reinterpret_cast<double*>(stats),
                                reinterpret_cast<const int64_t*>(chain_id),
                                reinterpret_cast<const void*>(step_sizes),
                                reinterpret_cast<const void*>(noise_scales),
                                chains, elements, step_size, noise_scale, precision, grad_clip, low, high,
                                lookahead_size, noise_first, seed, step, static_cast<Type>(type), threads};
        }));
    m.def("langevin", &langevin, py::call_guard<py::gil_scoped_release>());
    m.def(
        "langevin_again",
        [](LangevinStep& s, uintptr_t x, uintptr_t grad, double step_size, double noise_scale, double precision,
           double grad_clip, double low, double high, uint32_t step, int threads) {
            s.x = reinterpret_cast<void*>(x), s.grad = reinterpret_cast<const void*>(grad);
            s.step_size = step_size, s.noise_scale = noise_scale, s.precision = precision, s.grad_clip = grad_clip;
            s.low = low, s.high = high, s.step = step, s.threads = threads;
            langevin(s);
        },
        py::call_guard<py::gil_scoped_release>());
    m.def("langevin_words", &langevin_words, py::call_guard<py::gil_scoped_release>());
    m.def(
        "langevin_accept",
        [](const LangevinStep& s, uintptr_t proposal, uintptr_t proposal_grad, uintptr_t energy,
           uintptr_t proposal_energy, uint32_t accept_step, uintptr_t log_alpha, uintptr_t accepted) {
            const LangevinAccept a{s,
                                   reinterpret_cast<const void*>(proposal),
                                   reinterpret_cast<const void*>(proposal_grad),
                                   reinterpret_cast<const double*>(energy),
                                   reinterpret_cast<const double*>(proposal_energy),
                                   accept_step,
                                   reinterpret_cast<double*>(log_alpha),
                                   reinterpret_cast<bool*>(accepted)};
            langevin_accept(a);
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "philox",
        [](uintptr_t counter, int64_t count, uint64_t seed, uintptr_t words) {
            philox_words(reinterpret_cast<const uint32_t*>(counter), count, seed, reinterpret_cast<uint32_t*>(words));
        },
        py::call_guard<py::gil_scoped_release>());
}
