namespace {

template <class T>
void run_median(uintptr_t x, uintptr_t y, uintptr_t value, uintptr_t pair, int64_t n, int64_t m, int64_t d, int64_t rank,
         bool same, int threads) {
    const fastgen::MedianArguments<T> arguments{reinterpret_cast<const T*>(x),
                                                reinterpret_cast<const T*>(y),
                                                reinterpret_cast<T*>(value),
                                                reinterpret_cast<int64_t*>(pair),
                                                n,
                                                m,
                                                d,
                                                rank,
                                                same,
                                                threads};
    py::gil_scoped_release release;
    fastgen::median(arguments);
}

}  // namespace

void bind_mmd_median(py::module_& m) {
    const char* doc = "mmd_median(x, y, value, pair, n, m, d, rank, same, threads): addresses of contiguous points.";
    m.def("mmd_median_f32", &run_median<float>, doc);
    m.def("mmd_median_f64", &run_median<double>, doc);
}
