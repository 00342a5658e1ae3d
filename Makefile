# From a fresh clone: `make train` and `make test` do all the set-up there is.
PYTHON ?= python3
BIN = .venv/bin
PROCESSES ?= 2

.PHONY: train test test-cluster faults soak fuzz bench clean

train: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) -m alpha_maml train --config configs/quickstart.yaml

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/pyright
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --ignore tests/faults --ignore tests/launch/test_slurm.py \
	    --ignore tests/tracking/test_comparison.py

# What needs root and Debian's packages: 20 kills, nodes that leave and return, a cluster of two nodes, MLflow in a browser.
test-cluster: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/faults tests/launch/test_slurm.py \
	    tests/tracking/test_comparison.py

# 100 faults of the outside and 100 kills; test-cluster does 13 and 20. Needs root, and iproute2 for nodes as network namespaces.
faults: .venv/ready
	$(BIN)/python tests/faults/harness.py --kills 100 --outside 100

# 200,000 iterations of two ranks, watched: about 20 minutes in which nothing else should run.
soak: .venv/ready
	$(BIN)/python tests/faults/soak.py

# 10,000 generated bad inputs, about 20 minutes; test does 500.
fuzz: .venv/ready
	$(BIN)/python tests/fuzz/fuzz.py --cases 10000

# Ours beside the field's libraries, on this machine: about half an hour in which nothing else should run.
bench: .venv/bench
	LEARN2LEARN=$(CURDIR)/.venv/learn2learn $(BIN)/python tests/benchmarks/bench.py
	$(BIN)/python tests/benchmarks/iteration.py
	$(BIN)/python tests/benchmarks/vectorised.py

# learn2learn does not build on a current Python: its source distribution is unpacked and its MAML class used from there.
.venv/bench: .venv/ready
	$(BIN)/pip install -q --constraint constraints.txt --editable '.[bench]'
	$(BIN)/pip download -q --no-deps --no-binary :all: --dest .venv/learn2learn learn2learn==0.2.0
	tar -xzf .venv/learn2learn/learn2learn-0.2.0.tar.gz -C .venv/learn2learn --strip-components 1
	touch $@

# torch comes first and pinned: resolved together with the others, pip would take the newest build with all of CUDA.
.venv/ready: constraints.txt pyproject.toml
	@echo "Setting up .venv with torch, DeepSpeed and MLflow: some minutes, without a word, once."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --constraint constraints.txt torch==2.13.0
	DS_BUILD_OPS=0 $(BIN)/pip install -q --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
