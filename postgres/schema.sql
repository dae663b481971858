-- One item, its stock, and one row for each unit sold: schema.sql in PostgreSQL's words.
-- The constraints are the last word: a bug in the program may refuse a sale, it can't sell a unit twice.

CREATE TABLE inventory (
    item_id       integer PRIMARY KEY CHECK (item_id = 1),      -- one row: one sale, one row lock
    item_name     text        NOT NULL,
    stock         integer     NOT NULL CHECK (stock >= 0),      -- never oversold; NOT NULL, as CHECK lets NULL pass
    initial_stock integer     NOT NULL,
    last_updated  timestamptz NOT NULL DEFAULT clock_timestamp(),  -- for people to read: nothing is decided by it
    CHECK (stock <= initial_stock)                              -- no unit comes back that wasn't there
) WITH (fillfactor = 10);  -- each sale leaves a dead version of the row: room for them on its page, and no
                           -- index on stock, so that the next sale clears them away in passing (HOT)

CREATE TABLE purchases (
    purchase_id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,  -- never used twice; drawn under the row
                                                                      -- lock, so its order is the sales' order
    item_id         integer     NOT NULL REFERENCES inventory (item_id),
    customer_id     text        NOT NULL CHECK (length(customer_id) BETWEEN 1 AND 128),
    idempotency_key text        CHECK (length(idempotency_key) BETWEEN 1 AND 255),  -- NULL: the buyer sent none
    remaining_stock integer     NOT NULL CHECK (remaining_stock >= 0),  -- after this sale: what its 200 said
    purchase_time   timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- One key, one purchase. Partial, so that a sale without a key doesn't write an index page.
CREATE UNIQUE INDEX purchases_by_idempotency_key ON purchases (idempotency_key)
    WHERE idempotency_key IS NOT NULL;

-- How a start tells these tables from others, and their version.
COMMENT ON TABLE inventory IS 'flash sale inventory, schema 1';
