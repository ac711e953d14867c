import pytest
import torch

from fastgen import _C
from fastgen.ops import nearest as ops

KERNELS = [("baseline", False, 0), ("avx2", False, 0), ("avx512", False, 0), ("avx512", True, 0)]
SCANS = [(isa, False, 1 << 40) for isa in ("baseline", "avx2", "avx512")]  # whatever the number of queries


@pytest.fixture(params=KERNELS + SCANS, ids=lambda one: f"{one[0]}{'-vnni' * one[1]}{'-scan' * (one[2] > 0)}")
def search(request):
    """The kernel compiled for one instruction set, the database packed or scanned."""
    isa, vnni, few = request.param
    before = _C.isa()
    try:
        _C.set_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    yield lambda q, b, k=1, mask=None, radius=None, every_pair=False: ops.search_cpp(
        _C, q, b, mask, k, radius, every_pair, vnni=vnni, few=few
    )
    _C.set_isa(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("n", "m", "d", "k"),
    [
        (1, 1, 1, 1),
        (13, 31, 2, 31),
        (15, 33, 3, 2),
        (5, 90, 33, 3),
        (90, 700, 65, 1),
        (28, 64, 800, 5),
        (6, 37, 256, 1),
    ],
)
def test_equals_oracle(oracle, search, dtype, n, m, d, k):
    query, database = torch.randn(n, d, dtype=dtype), torch.randn(m, d, dtype=dtype)
    assert torch.equal(search(query, database, k), oracle.nearest(query, database, k)[1])


@pytest.mark.parametrize("k", [1, 7, 70])
def test_ties_without_number(oracle, search, k):
    """More equal rows than a list of candidates holds: it must be measured, emptied and filled again."""
    query, database = torch.randint(0, 2, (17, 3)).float(), torch.randint(0, 2, (2000, 3)).float()
    assert torch.equal(search(query, database, k), oracle.nearest(query, database, k)[1])


def test_extremes_of_the_integers(oracle, search):
    """One coordinate carries all of the norm: it reaches the largest integer, both signs, and keys their ends."""
    query = torch.cat([torch.eye(5), -torch.eye(5)]) * 3.0
    database = torch.cat([torch.eye(5), -torch.eye(5)]).repeat(20, 1) * (3 - 1e-4 * torch.arange(200.0)[:, None])
    for k in (1, 30):
        assert torch.equal(search(query, database, k), oracle.nearest(query, database, k)[1])


def test_near_ties_beyond_the_integers(oracle, search):
    """Differences far below a step of the 16-bit integers are decided by the direct distances."""
    query = torch.randn(20, 10)
    database = torch.randn(1, 10) + 1e-6 * torch.randn(400, 10)
    assert torch.equal(search(query, database, 3), oracle.nearest(query, database, 3)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("query", "row", "nearest"),
    [  # 1 and 1 + 2⁻²³ away; by fused multiply-adds the other way round
        (
            ("0x1.2222a4p-1", "0x1.2512a4p-1", "0x1.f74ac2p-11", *"00000", "0x1.2f6fb2p-1"),
            ("-0x1.c1735ap-26", "0", "0x1.149078p-36", *"00000", "0x1.952054p-27"),
            0,
        ),
        (
            ("0x1.282248p-1", "0x1.1f694ep-1", "0x1.0035bcp-10", *"00000", "0x1.2f0e72p-1"),
            ("0x1.6d9e98p-28", "0", "0x1.1dee08p-37", *"00000", "0x1.67ee6p-26"),
            1,
        ),
    ],
    ids=["1", "above 1"],
)
def test_products_and_sums_round_apart(search, dtype, query, row, nearest):
    q, b = (torch.tensor([[float.fromhex(x) for x in values]], dtype=dtype) for values in (query, row))
    away = q + torch.eye(9, dtype=dtype)[3:4]  # 1, exactly
    assert search(q, torch.cat([b, away])).item() == nearest


def test_masks(oracle, search):
    query, database = torch.randn(50, 6), torch.randn(300, 6)
    for mask in (torch.rand(300) > 0.4, torch.rand(50, 300) > 0.4):
        assert torch.equal(search(query, database, 2, mask), oracle.nearest(query, database, 2, mask)[1])


@pytest.mark.parametrize("k", [1, 2, 40, 150])
def test_the_bound_is_needed_nearly_whole(oracle, search, k):
    """Rounding errors that all point one way, as Cauchy and Schwarz allow: the filter's keys favour the wrong rows by
    0.95 times the slack that the bound gives them."""
    d, steps, unit = 16, 32700, 2.0**-10  # nearest.cpp's STEPS: the largest norm in units of the integers' scale
    query = torch.full((30, d), 0.49)  # rounds to zero: all rows of norm `steps` get one key
    query[:, 0] -= 1e-4 * torch.arange(30)
    right = torch.full((1, d), 8175.0)  # 16 · 8175² = 32700²
    wrong = -right + torch.arange(d).ne(0).float()  # a little nearer to zero
    axis = steps * torch.eye(d)[:1]
    balance = -axis - torch.arange(d).ne(0).float()  # the centre is zero: everything lies on the grid
    database = torch.cat([right, wrong, axis, balance]).repeat(k, 1)
    assert not database.sum(0).any()
    query, database = unit * query, unit * database
    expected = oracle.nearest(query, database, k)[1]
    assert torch.equal(expected, torch.arange(0, 4 * k, 4).expand(30, k))
    assert torch.equal(search(query, database, k), expected)


def test_the_slack_of_the_kth(oracle, search):
    """Many rows at nearly one distance: the k-th by rounded keys is not the k-th."""
    query, database = torch.randn(120, 12), torch.randn(1000, 12)
    for k in (100, 400):
        assert torch.equal(search(query, database, k), oracle.nearest(query, database, k)[1])


def test_a_row_that_is_all_in_one_coordinate(oracle, search):
    """Its integer is the largest there is: one step more would be a number of the other sign."""
    axes = torch.cat([torch.eye(6), -torch.eye(6)])
    database = torch.cat([0.5 * axes, 3.0 * axes, 0.6 * axes])
    for scale in (2.0, 2.6, 3.0, 3.7):
        for k in (1, 3):
            assert torch.equal(search(scale * axes, database, k), oracle.nearest(scale * axes, database, k)[1])


@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_radius(oracle, search, dtype, k):
    """From a radius that rejects nothing to one that leaves few rows; more rows within it than a list holds."""
    query, database = torch.randn(70, 3, dtype=dtype), torch.randn(1500, 3, dtype=dtype)
    for radius in (1e-3, 0.1, 0.3, 0.6):
        left = oracle.left(query, database, None, radius)[0].sum()
        assert left >= k
        assert torch.equal(
            search(query, database, k, None, radius), oracle.nearest(query, database, k, None, radius)[1]
        )


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("apart", [0, 40], ids=["together", "later"])
def test_a_rejected_row_sets_no_limit(oracle, search, k, apart):
    """As above the keys of `best` err by nearly all of the bound E, and the others' by nothing. `best`
    lies 0.1 E beyond the radius, so its key lies above all that may be rejected; `others` lie 0.4 E farther, with keys
    below. A limit drawn from the rejected row's key would drop `best` and leave them."""
    d, steps, unit = 16, 32700, 2.0**-10
    query = torch.full((30, d), 0.49)  # rounds to zero
    error = 4 * 0.49 * steps
    best, flat = torch.full((1, d), 8175.0), torch.tensor([1.0, -1]).repeat(d // 2)[None]
    # 1 less in each of j coordinates takes 8175 from ‖b‖²/2, an eighth of the bound.
    others = 8175 * flat - flat * (torch.arange(d) < torch.tensor([[5], [4], [3]]))
    rejected = (0.9 * 8175 * flat).round()
    filler = torch.cat([steps * torch.eye(d)[:1], -steps * torch.eye(d)[:1]]).repeat(max(apart, 4) // 2, 1)
    database = torch.cat([rejected, filler, best, others])
    database = torch.cat([database, -database])  # the mean is zero: everything lies on the grid
    query, database = unit * query, unit * database
    row = len(rejected) + len(filler)
    radius = ((query[0] - database[row]).double().square().sum() - 0.2 * error * unit**2).sqrt().item()
    distance, expected = oracle.nearest(query, database, 2, None, radius)
    assert (expected[:, 0] == row).all()
    assert torch.allclose((distance[:, 1] - distance[:, 0]) / unit**2 / 2 / error, torch.tensor(0.36), atol=0.01)
    assert torch.equal(search(query, database, k, None, radius), expected[:, :k])


def test_radius_with_masks(oracle, search):
    query = torch.randn(50, 3)
    for mask in (torch.rand(400) > 0.4, torch.rand(50, 400) > 0.6):
        database = torch.randn(400, 3)
        database[~mask.view(-1, 400).any(0)] = torch.nan
        got = search(query, database, 2, mask, 0.5)
        assert torch.equal(got, oracle.nearest(query, database, 2, mask, 0.5)[1])


def test_a_radius_is_strict(search):
    """Rows at the radius itself stay; a query has no answer where fewer than k rows are left."""
    query, database = torch.zeros(2, 2), torch.tensor([[1.0, 0], [0, 1.25], [0, 3]])
    assert search(query, database, 1, None, 1.25).tolist() == [[1], [1]]
    assert search(query, database, 2, None, 1.25).tolist() == [[1, 2]] * 2
    assert search(query, database, 3, None, 1.25).tolist() == [[-1] * 3] * 2
    assert search(query, database, 1, None, 4.0).tolist() == [[-1], [-1]]
    assert search(query, database, 3, None, 1.0).tolist() == [[0, 1, 2]] * 2


def test_every_pair(oracle, search):
    query, database = torch.randint(-2, 3, (40, 5)).float(), torch.randint(-2, 3, (700, 5)).float()
    mask = torch.rand(40, 700) > 0.5
    for k, allowed, radius in ((1, None, None), (90, mask, None), (3, mask[0], 0.5), (1, mask, 0.5)):
        expected = oracle.nearest(query, database, k, allowed, radius)[1]
        assert torch.equal(search(query, database, k, allowed, radius, True), expected)


def test_threads_agree(search):
    query, database = torch.randn(900, 20), torch.randn(3000, 20)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(torch.cat([search(query, database, 2), search(query, database, 2, None, 3.0)]))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("n", [2, 9])
@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
@pytest.mark.parametrize("k", [1, 3])
def test_float_sums_that_err_both_ways(oracle, search, n, lanes, k):
    """`wrong` loses half an ulp at each of its sums, `right` gains as much: kernels that add in so many lanes see them
    in the other order, a hundred ulps apart."""
    d, ulp = 100 * lanes, 2.0**-23
    query = torch.zeros(n, d)
    right, wrong = torch.full((1, d), (0.501 * ulp) ** 0.5), torch.full((1, d), (0.499 * ulp) ** 0.5)
    right[:, :lanes], wrong[:, :lanes] = 1, 1 + ulp
    database = torch.cat([wrong.expand(40, d), right.expand(3, d), wrong.expand(200, d)])
    expected = oracle.nearest(query, database, k)[1]
    assert expected[0].tolist() == [40, 41, 42][:k]
    assert torch.equal(search(query, database, k), expected)


@pytest.mark.parametrize("n", [2, 9])
@pytest.mark.parametrize("k", [1, 3])
def test_squares_below_the_least_float(oracle, search, n, k):
    """Each square of `wrong` is lost to float32, together they are 770 times the least number that it has."""
    d, least = 1600, 2.0**-149
    query = torch.zeros(n, d)
    wrong, right = torch.full((1, d), (0.482 * least) ** 0.5), torch.zeros(1, d)
    right[0, 5] = (700 * least) ** 0.5
    database = torch.cat([wrong.expand(40, d), right.expand(3, d), wrong.expand(200, d)])
    expected = oracle.nearest(query, database, k)[1]
    assert expected[0].tolist() == [40, 41, 42][:k]
    assert torch.equal(search(query, database, k), expected)


@pytest.mark.parametrize("k", [1, 3])
def test_squares_that_are_flushed_to_zero(oracle, search, k):
    """Where torch flushes what is not normal, all squares of `wrong` but one are lost to float32, 1450 ulps."""
    d, query = 1 << 14, torch.zeros(9, 1 << 14)
    wrong, right = torch.full((1, d), 2.0**-63.25), torch.zeros(1, d)
    wrong[0, 5], right[0, 5] = 2.0**-50, 2.0**-50 * (1 + 1160 * 2.0**-23) ** 0.5
    database = torch.cat([wrong.expand(9, d), right.expand(3, d), wrong.expand(20, d)])
    expected = oracle.nearest(query, database, k)[1]
    assert expected[0].tolist() == [9, 10, 11][:k]
    assert torch.set_flush_denormal(True)
    try:
        assert torch.equal(search(query, database, k), expected)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", [3, 16, 33])
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_every_place_of_what_is_not_finite(search, dtype, d, bad):
    for row in (0, 17, 18, 39):
        for column in {0, d // 2, d - 1}:
            points = torch.randn(40, d, dtype=dtype)
            points[row, column] = bad
            some, nine = torch.zeros(1, d, dtype=dtype), torch.zeros(9, d, dtype=dtype)
            for name, operands in (
                ("query", (points, some)),
                ("database", (some, points)),
                ("database", (nine, points)),
            ):
                with pytest.raises(ValueError, match=f"{name}: .* in row {row}\\b"):
                    search(*operands)
            mask = torch.ones(40, dtype=torch.bool)
            mask[row] = False
            assert mask[search(torch.zeros(2, d, dtype=dtype), points, 1, mask)].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_farther_than_float32_holds(search, dtype):
    """They are finite and no answer; where they are the only ones, the caller looks with float64."""
    database = torch.full((100, 9), 3e38, dtype=dtype)
    database[70] = 1
    for n in (3, 9):
        assert search(torch.zeros(n, 9, dtype=dtype), database).tolist() == [[70]] * n
        assert search(torch.zeros(n, 9, dtype=dtype), database[:50]) is None
