# userpilot: keeps Userpilot in step with the companies and users of a database
MODULE_big = userpilot
EXTENSION = userpilot
DATA = sql/userpilot--1.0.sql
PGFILEDESC = "userpilot - delivers companies and users to Userpilot"

OBJS = $(patsubst %.c,%.o,$(sort $(wildcard src/*.c)))

REGRESS = environment
REGRESS_OPTS = --inputdir=test

PG_CPPFLAGS = -Isrc $(shell curl-config --cflags)
PG_CFLAGS = -Wall -Wextra -Wno-unused-parameter
SHLIB_LINK = $(shell curl-config --libs)

PG_CONFIG ?= pg_config
PGXS := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)
