# userpilot: keeps Userpilot in step with the companies and users of a database
#
#   make && make install        build and install (PG_CONFIG picks the server)
#   make unit                   pure modules, without a server; exported names
#   make reliability            long runs under kills, stops and faults
#   make bench                  what it costs, against real baselines
#   make installcheck           SQL, concurrency and processes, with servers of
#                               their own; not as root, which PostgreSQL
#                               refuses: test/run takes care of that
MODULE_big = userpilot
EXTENSION = userpilot
DATA = sql/userpilot--1.0.sql
PGFILEDESC = "userpilot - delivers companies and users to Userpilot"

OBJS = $(patsubst %.c,%.o,$(sort $(wildcard src/*.c)))

# pg_regress: --inputdir=test finds test/sql and the top-level expected/
REGRESS = $(patsubst test/sql/%.sql,%,$(sort $(wildcard test/sql/*.sql)))
REGRESS_OPTS = --inputdir=test --temp-instance=./tmp_regress \
	--temp-config=test/regress.conf
ISOLATION = $(patsubst test/specs/%.spec,%,$(sort $(wildcard test/specs/*.spec)))
ISOLATION_OPTS = --inputdir=test --outputdir=. \
	--temp-instance=./tmp_isolation --temp-config=test/regress.conf
TAP_TESTS = 1
PROVE_TESTS = test/t/*.pl

UNIT = test/unit/merge_histories test/unit/delivery_cells
EXTRA_CLEAN = $(UNIT) tmp_check tmp_regress tmp_isolation

ifeq ($(shell command -v curl-config),)
ifneq ($(MAKECMDGOALS),clean)
$(error curl-config is missing; on Debian it is in libcurl4-openssl-dev)
endif
endif

PG_CPPFLAGS = -Isrc $(shell curl-config --cflags)
PG_CFLAGS = -Wall -Wextra -Wno-unused-parameter
SHLIB_LINK = $(shell curl-config --libs)

PG_CONFIG ?= pg_config
PGXS := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)

# sql/NAME.sql would be run instead of test/sql/NAME.sql
ifneq ($(filter $(notdir $(wildcard test/sql/*.sql)),$(notdir $(wildcard sql/*.sql))),)
$(error a file in sql/ has the name of a test)
endif

$(OBJS): $(wildcard src/*.h)

ifeq ($(PORTNAME),linux)
SHLIB_LINK += -Wl,--version-script=src/exports.map
userpilot.so: src/exports.map
endif

# The pure modules, built as frontend code: no server, no SQL, no HTTP
UNIT_CFLAGS = -O2 -Wall -Wextra -Wno-unused-parameter -DFRONTEND \
	-I$(shell $(PG_CONFIG) --includedir-server) -Isrc
UNIT_LIBS = -L$(shell $(PG_CONFIG) --pkglibdir) -lpgcommon -lpgport -lm

test/unit/merge_histories: $(wildcard test/unit/merge_*.[ch]) src/merge.c src/merge.h
	$(CC) $(UNIT_CFLAGS) -o $@ $(filter %.c,$^) $(UNIT_LIBS)

test/unit/delivery_cells: test/unit/delivery_cells.c src/delivery.c src/delivery.h
	$(CC) $(UNIT_CFLAGS) -o $@ $(filter %.c,$^) $(UNIT_LIBS)

# A guard taken away must show: a test that cannot fail proves nothing
unit: $(UNIT) $(shlib)
	prove $(PROVE_FLAGS) $(addprefix ./,$(UNIT)) test/unit/guards.sh test/unit/symbols.sh

# Long runs under kills, stops and faults; ROUNDS makes them longer
reliability:
	$(MAKE) installcheck REGRESS= ISOLATION= PROVE_TESTS='test/reliability/*.pl'

# What it costs, against real baselines; bench/README.md
bench:
	bash bench/run

.PHONY: unit reliability bench
