python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl .whl2/*.whl && export PYTHONPATH=/tmp/site; python3 -m pip install -q --no-deps --no-build-isolation -e . 2>&1 | tail -1
export OMP_NUM_THREADS=1
(timeout 560 python3 -m pytest -q -n 14 tests/loops -m "slow or not slow" -p no:cacheprovider --dist load > $OUT/loops.log 2>&1; echo rc $? >> $OUT/loops.log) &
(timeout 560 python3 -m pytest -q -n 0 tests/campaigns/test_architectures.py -m campaign --whole > $OUT/arch.log 2>&1; echo rc $? >> $OUT/arch.log; cp docs/architectures.md $OUT/ ) &
wait
tail -60 $OUT/loops.log; tail -30 $OUT/arch.log
