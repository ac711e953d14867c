void bind_nearest(py::module_& m) {
    m.def(
        "nearest",
        [](uintptr_t query, uintptr_t database, bool is_double, int64_t n, int64_t m, int64_t d, int64_t k, uintptr_t mask,
           bool mask_per_query, uintptr_t index, uintptr_t distance, int threads, bool vnni, bool every_pair,
           double reach, uintptr_t rejected, int64_t few) {
            fastgen::NearestStatus status;
            {
                py::gil_scoped_release release;
                status = fastgen::nearest({reinterpret_cast<const void*>(query), reinterpret_cast<const void*>(database),
                                           is_double, n, m, d, k, reinterpret_cast<const uint8_t*>(mask),
                                           mask_per_query ? m : 0, reinterpret_cast<int64_t*>(index),
                                           reinterpret_cast<float*>(distance), threads, vnni, few, every_pair, reach,
                                           reinterpret_cast<uint8_t*>(rejected)});
            }
            const char* names[] = {"ok", "query", "database", "overflow"};
            return std::pair<const char*, int64_t>(names[status.code], status.row);
        },
        py::arg("query"), py::arg("database"), py::arg("is_double"), py::arg("n"), py::arg("m"), py::arg("d"), py::arg("k"),
        py::arg("mask"), py::arg("mask_per_query"), py::arg("index"), py::arg("distance"), py::arg("threads"),
        py::arg("vnni") = true, py::arg("every_pair") = false, py::arg("reach") = 0.0, py::arg("rejected") = 0,
        py::arg("few") = fastgen::NearestProblem{}.few,
        "k smallest (distance, index) of each query. Returns (\"ok\", 0), (\"query\" or \"database\", row that is not "
        "finite) or (\"overflow\", 0): float32 does not hold what the search met. `rejected` [m] marks the rows below "
        "`reach` of a query; the caller searches queries again whose answer another query rejected.");
    m.def(
        "nearest_distance",
        [](uintptr_t query, uintptr_t database, bool is_double, int64_t n, int64_t m, int64_t d, int64_t k, uintptr_t index,
           uintptr_t distance, int threads) {
            py::gil_scoped_release release;
            fastgen::nearest_distance({reinterpret_cast<const void*>(query), reinterpret_cast<const void*>(database), is_double,
                                       n, m, d, k, nullptr, 0, reinterpret_cast<int64_t*>(index),
                                       reinterpret_cast<float*>(distance), threads, true});
        },
        py::arg("query"), py::arg("database"), py::arg("is_double"), py::arg("n"), py::arg("m"), py::arg("d"), py::arg("k"),
        py::arg("index"), py::arg("distance"), py::arg("threads"), "Direct distances of the rows `index` [n, k].");
}
