# What developers do often. Everything else is `toolkit --help`.
PYTHON ?= .venv/bin/python

.PHONY: check docs generated quick quickstart slow test

check:  ## lint and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

quick:  ## the tests without a marker; one that takes longer than 30 s needs the marker `long`
	$(PYTHON) -m pytest -n 2 --dist loadfile -m "not (slow or extended or long)" --timeout 30

test:  ## the default tests
	$(PYTHON) -m pytest -n 3 --dist loadfile

slow:  ## kills, soaks, clusters at length, the attack suite, all architectures
	$(PYTHON) -m pytest -m "slow or extended"

docs:  ## the documentation as a site in build/docs, without a network; a broken link or an unreachable page is an error
	$(PYTHON) -m sphinx -q -W --keep-going docs build/docs

generated:  ## files made from the schema and the installed libraries
	$(PYTHON) -m toolkit.recipe.catalog
	$(PYTHON) -m toolkit.recipe.jsonschema
	$(PYTHON) -m toolkit.recipe.docs_generator

quickstart:
	$(PYTHON) -m toolkit.train recipes/quickstart.toml
