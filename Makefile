# make gpu-check OUT=report: one command for whoever has a GPU for half an hour; CONTRIBUTING.md says more.
PYTHON ?= python3
OUT ?= build/gpu-check

.PHONY: gpu-check
gpu-check:
	$(PYTHON) tools/gpu_check.py --out "$(OUT)" $(ARGS)
