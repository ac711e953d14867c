namespace {

// A tensor's address and whether it has a batch dimension; (0, false) for none.
using Optional = std::pair<uintptr_t, bool>;

template <class T>
void run_mmd(uintptr_t x, uintptr_t y, Optional x_weight, Optional y_weight, Optional coefficients,
         const std::vector<uintptr_t>& out, int64_t batch, int64_t n, int64_t m, int64_t d, const std::string& kind,
         const std::vector<double>& parameters, int estimator, int terms, int threads) {
    fastgen::MmdArguments<T> arguments{reinterpret_cast<const T*>(x),
                                       reinterpret_cast<const T*>(y),
                                       reinterpret_cast<const T*>(x_weight.first),
                                       reinterpret_cast<const T*>(y_weight.first),
                                       reinterpret_cast<const double*>(coefficients.first),
                                       x_weight.second,
                                       y_weight.second,
                                       coefficients.second,
                                       reinterpret_cast<T*>(out.at(0)),
                                       out.size() > 1 ? reinterpret_cast<T*>(out[1]) : nullptr,
                                       out.size() > 2 ? reinterpret_cast<T*>(out[2]) : nullptr,
                                       batch,
                                       n,
                                       m,
                                       d,
                                       kind,
                                       parameters,
                                       estimator,
                                       terms,
                                       threads};
    py::gil_scoped_release release;
    fastgen::mmd(arguments);
}

}  // namespace

void bind_mmd(py::module_& m) {
    const char* doc =
        "mmd(x, y, x_weight, y_weight, coefficients, [value, gx, gy], batch, n, m, d, kind, parameters, estimator, terms, "
        "threads): addresses of contiguous [batch, n, d] and [batch, m, d] points; (address, batched) of weights and "
        "coefficients, (0, False) for none; gx and gy may be missing.";
    m.def("mmd_f32", &run_mmd<float>, doc);
    m.def("mmd_f64", &run_mmd<double>, doc);
}
