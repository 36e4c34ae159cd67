# Each target sets up what it needs. Nothing is installed outside .venv.
VENV := .venv
STAMP := $(VENV)/.installed
# The demo needs a third less than the tests. Both use the same environment.
DEMO_STAMP := $(VENV)/.installed-demo

# Only one pip at a time may fill the environment.
.NOTPARALLEL:

WORKERS := 3
# CPU=avx512|avx2|generic: behave like a processor without later instructions
AS_CPU = $(if $(CPU),scripts/as_cpu.sh $(CPU))

.PHONY: setup demo test test-vllm soak check check-kernels bench screenshots docs lock clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/install.sh
	@echo "setting up $(VENV) (a minute or two the first time)"
	@scripts/install.sh $(VENV) dev
	@touch $@ $(DEMO_STAMP)

$(DEMO_STAMP): pyproject.toml constraints.txt scripts/install.sh
	@echo "setting up $(VENV) (a minute or two the first time)"
	@scripts/install.sh $(VENV)
	@touch $@

demo: $(DEMO_STAMP)  ## train, publish and serve two adapters; EXIT=1 exits when done
	@$(AS_CPU) $(VENV)/bin/adapterhub demo $(if $(EXIT),--exit)

test: setup  ## run all tests but those with a real vLLM, WORKERS=3 at a time; ORDER=random shuffles them, CPU=avx2 uses fewer instructions
	@scripts/browser.sh
	@$(AS_CPU) $(VENV)/bin/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(if $(ORDER),,-p no:randomly)

test-vllm: setup  ## run the tests with a real vLLM server on the CPU, in its own environment (2.5 GB)
	@scripts/vllm.sh $(VENV)-vllm
	@ADAPTERHUB_VLLM_PYTHON=$(VENV)-vllm/bin/python $(VENV)/bin/pytest -m vllm -n 2 --dist loadfile -p no:randomly tests/serve/vllm_engine/test_real*.py

SOAKED := tests/hubserver/test_faults.py tests/hubserver/test_durability.py tests/adapterhub/test_kills.py tests/train/loop/test_resume.py tests/train/loop/test_stopping.py tests/train/planning/test_unsupported.py tests/serve/training/test_runs.py tests/train/distributed/test_world.py tests/serve/local_engine/test_random_parameters.py tests/test_models_table.py
soak: setup  ## kill the Hub and the registry at random moments, five minutes each (SOAK_S=seconds); send 10,000 random requests; draw new examples for the property tests
	@ADAPTERHUB_SOAK_S=$(or $(SOAK_S),300) $(VENV)/bin/pytest --timeout 0 $(SOAKED)
	@$(VENV)/bin/pytest --timeout 0 --hypothesis-profile=default $$(grep -rl hypothesis tests --include='test_*.py')

check: setup  ## check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

check-kernels: setup  ## test the C kernels under AddressSanitizer and UBSan for every instruction set, and for Arm under qemu
	@PYTHONPATH=. $(VENV)/bin/python scripts/check_kernels.py

bench: setup  ## measure decode speed against PEFT and transformers, and adapters that are not resident; under five minutes
	@$(VENV)/bin/python benchmarks/decode.py --rounds 2 --tokens 12
	@$(VENV)/bin/python benchmarks/residency.py --rounds 2

screenshots: setup  ## take a screenshot of every tab of the page, with a real server
	@scripts/browser.sh
	@$(VENV)/bin/python scripts/screenshots.py

docs: setup  ## regenerate docs/cli.md from the command itself, docs/models.md from what it does with each architecture
	@PYTHONPATH=. $(VENV)/bin/python scripts/models_table.py
	$(VENV)/bin/typer adapterhub.cli.main utils docs --name adapterhub --title "The command adapterhub" --output docs/cli.md

lock: setup  ## write the installed versions to constraints.txt
	@{ sed -n 1p constraints.txt; $(VENV)/bin/pip freeze --exclude-editable | sed 's/+cpu//'; } > constraints.new
	@mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) $(VENV)-vllm .demo .cache
