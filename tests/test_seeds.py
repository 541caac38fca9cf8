"""Seeds of streams: the numbers on which runs that are repeated or resumed depend."""

from utils.seeds import mixed_seed, stream_seed


def test_seeds_stay_what_they_are():
    assert (stream_seed(0, 1), stream_seed(7, 5)) == (2440950710608614359, 357151440010260211)
    assert (mixed_seed(0, 0, 0), mixed_seed(7, 3, 1, 42)) == (2635072618980576772, 2573920062069869170)


def test_streams_do_not_meet():
    purposes = [(), *((a,) for a in range(8)), *((a, b) for a in range(8) for b in range(8)), (0, 0, 0), (1, 0, 1)]
    seeds = [mixed_seed(seed, *purpose) for seed in range(20) for purpose in purposes]
    assert len(set(seeds)) == len(seeds)
