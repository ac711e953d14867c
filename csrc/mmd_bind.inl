namespace {

template <class T>
void run_mmd(uintptr_t x, uintptr_t y, uintptr_t vx, uintptr_t vy, uintptr_t x_weight, uintptr_t y_weight,
             uintptr_t coefficients, uintptr_t value, uintptr_t gx, uintptr_t gy, int64_t batch, int64_t n, int64_t m,
             int64_t d, std::string kind, std::vector<double> parameters, int estimator, int terms, int threads) {
    const fastgen::MmdArguments<T> arguments{reinterpret_cast<const T*>(x),
                                             reinterpret_cast<const T*>(y),
                                             reinterpret_cast<const T*>(vx),
                                             reinterpret_cast<const T*>(vy),
                                             reinterpret_cast<const T*>(x_weight),
                                             reinterpret_cast<const T*>(y_weight),
                                             reinterpret_cast<const double*>(coefficients),
                                             reinterpret_cast<T*>(value),
                                             reinterpret_cast<T*>(gx),
                                             reinterpret_cast<T*>(gy),
                                             batch,
                                             n,
                                             m,
                                             d,
                                             std::move(kind),
                                             std::move(parameters),
                                             estimator,
                                             terms,
                                             threads};
    py::gil_scoped_release release;
    fastgen::mmd(arguments);
}

}  // namespace

void bind_mmd(py::module_& m) {
    const char* doc =
        "mmd(x, y, vx, vy, x_weight, y_weight, coefficients, value, gx, gy, batch, n, m, d, kind, parameters, estimator, "
        "terms, threads): addresses of contiguous tensors, as MmdArguments has them; 0 for none.";
    m.def("mmd_f32", &run_mmd<float>, doc);
    m.def("mmd_f64", &run_mmd<double>, doc);
}
