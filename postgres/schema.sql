-- One item, its stock, and one row for each unit sold: schema.sql in PostgreSQL's words.
-- The constraints are the last word: a bug in the program may refuse a sale, not sell a unit twice.

-- Each sale leaves a dead version of the row. The fill factor leaves room for them on its page, and
-- no index holds the stock, so the next sale clears them away in passing (HOT).
CREATE TABLE inventory (
    item_id       integer PRIMARY KEY CHECK (item_id = 1),  -- one row: one sale, one row lock
    item_name     text        NOT NULL,
    stock         integer     NOT NULL CHECK (stock >= 0),  -- never oversold; CHECK lets NULL pass
    initial_stock integer     NOT NULL,
    last_updated  timestamptz NOT NULL DEFAULT clock_timestamp(),  -- for people, decides nothing
    CHECK (stock <= initial_stock)  -- no unit comes back that wasn't there
) WITH (fillfactor = 10);

CREATE TABLE purchases (
    -- Never used twice. It is drawn under the row lock, so its order is the order of the sales.
    purchase_id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    item_id         integer     NOT NULL REFERENCES inventory (item_id),
    customer_id     text        NOT NULL CHECK (length(customer_id) BETWEEN 1 AND 128),
    idempotency_key text        CHECK (length(idempotency_key) BETWEEN 1 AND 255),  -- NULL: none
    remaining_stock integer     NOT NULL CHECK (remaining_stock >= 0),  -- what its 200 said
    purchase_time   timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- One key, one purchase. Partial, so that a sale without a key doesn't write an index page.
CREATE UNIQUE INDEX purchases_by_idempotency_key ON purchases (idempotency_key)
    WHERE idempotency_key IS NOT NULL;

-- How a start tells these tables from others, and their version.
COMMENT ON TABLE inventory IS 'flash sale inventory, schema 1';
