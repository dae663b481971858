-- One item, its stock, and one row for each unit sold.
-- The constraints are the last word: a bug in the program may refuse a sale, it can't sell a unit twice.
-- STRICT refuses text in a number's column, which CHECK (stock >= 0) alone would let pass.

CREATE TABLE inventory (
    item_id       INTEGER PRIMARY KEY CHECK (item_id = 1),      -- one row: one sale, one lock
    item_name     TEXT    NOT NULL,
    stock         INTEGER NOT NULL CHECK (stock >= 0),          -- never oversold; NOT NULL, as CHECK lets NULL pass
    initial_stock INTEGER NOT NULL,
    last_updated  TEXT    NOT NULL DEFAULT CURRENT_TIMESTAMP,   -- UTC, for people to read: nothing is decided by it
    CHECK (stock <= initial_stock)                              -- no unit comes back that wasn't there
) STRICT;

CREATE TABLE purchases (
    purchase_id     INTEGER PRIMARY KEY AUTOINCREMENT,          -- never used twice, not even after a reset
    item_id         INTEGER NOT NULL REFERENCES inventory (item_id),
    customer_id     TEXT    NOT NULL CHECK (length(customer_id) BETWEEN 1 AND 128),
    idempotency_key TEXT    CHECK (length(idempotency_key) BETWEEN 1 AND 255),  -- NULL: the buyer sent none
    remaining_stock INTEGER NOT NULL CHECK (remaining_stock >= 0),  -- after this sale: what its 200 said, for replays
    purchase_time   TEXT    NOT NULL DEFAULT CURRENT_TIMESTAMP  -- UTC
) STRICT;

-- One key, one purchase. Partial, so that a sale without a key doesn't write an index page.
CREATE UNIQUE INDEX purchases_by_idempotency_key ON purchases (idempotency_key)
    WHERE idempotency_key IS NOT NULL;

-- How a start tells this file from others: "FLSH", and the version of the tables above.
PRAGMA application_id = 0x464C5348;
PRAGMA user_version = 1;
