void bind_perceptual(py::module_& m) {
    using namespace fastgen;
    m.def(
        "lpips_layer",
        [](uintptr_t f0, uintptr_t f1, uintptr_t weight, uintptr_t grad, uintptr_t value, uintptr_t kept, uintptr_t out0,
           uintptr_t out1, int64_t n, int64_t c, int64_t pixels, double eps, bool inside, bool last, int type, int threads) {
            const LpipsLayer k{reinterpret_cast<const void*>(f0), reinterpret_cast<const void*>(f1),
                               reinterpret_cast<const void*>(weight), reinterpret_cast<const void*>(grad),
                               reinterpret_cast<void*>(value), reinterpret_cast<void*>(kept),
                               reinterpret_cast<void*>(out0), reinterpret_cast<void*>(out1), n, c, pixels, eps, inside, last, static_cast<Type>(type), threads};
            lpips_layer(k);
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "lpips_project",
        [](uintptr_t f, uintptr_t weight, uintptr_t grad, uintptr_t out, int64_t n, int64_t c, int64_t pixels, int64_t dim,
           int64_t layer, uint64_t seed, double eps, bool inside, int type, int threads) {
            const LpipsProject k{reinterpret_cast<const void*>(f), reinterpret_cast<const void*>(weight),
                                 reinterpret_cast<const void*>(grad), reinterpret_cast<void*>(out), n, c, pixels, dim, layer, seed, eps, inside, static_cast<Type>(type), threads};
            lpips_project(k);
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "feature_distance",
        [](uintptr_t f0, uintptr_t f1, uintptr_t grad, uintptr_t value, uintptr_t out, int64_t n, int64_t size,
           bool squared, int type, int threads) {
            const FeatureDistance k{reinterpret_cast<const void*>(f0), reinterpret_cast<const void*>(f1),
                                    reinterpret_cast<const void*>(grad), reinterpret_cast<void*>(value),
                                    reinterpret_cast<void*>(out), n, size, squared, static_cast<Type>(type), threads};
            feature_distance(k);
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "conv3x3",
        [](uintptr_t x, uintptr_t mask, uintptr_t kernel, uintptr_t bias, uintptr_t y, int64_t n, int64_t h, int64_t w,
           int64_t in, int64_t out, bool relu, int threads) {
            const Conv3x3 k{reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(mask),
                            reinterpret_cast<const float*>(kernel), reinterpret_cast<const float*>(bias),
                            reinterpret_cast<float*>(y), n, h, w, in, out, relu, threads};
            conv3x3(k);
        },
        py::call_guard<py::gil_scoped_release>());
}
