# make demo: everything from a fresh machine to a captioned picture. make test: the test suite;
# make test-slow: the tests that take minutes.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
DEMO := demo_5_cap_per_img_5_min_word_freq

# The files of tests are shared out to processes, which take a thread each.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --maxprocesses 8 --dist loadfile

.PHONY: demo test test-slow lint clean

demo: $(VENV)/ready
	$(PYTHON) create_input_files.py --dataset demo
	$(PYTHON) train.py --data_name $(DEMO) --overwrite
	$(PYTHON) eval.py --model data/BEST_checkpoint_$(DEMO).pth.tar --beam_size 1 3 5 \
		--attention_report 10 --report report
	$(PYTHON) caption.py --model data/BEST_checkpoint_$(DEMO).pth.tar \
		--img data/demo/images/test_0000[0-5].jpg

test: $(VENV)/ready
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/ready
	$(PYTEST) -m slow

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

$(VENV)/ready: requirements.txt requirements-dev.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet -r requirements-dev.txt
	touch $@
