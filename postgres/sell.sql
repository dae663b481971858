-- One sale. $1: the idempotency key or NULL, $2: the customer, $3: 'off' or NULL.
-- All parts see the database as it was when the statement began. Only UPDATE waits for the row, and
-- then looks at its newest version. If two requests with one key run at once, the unique index
-- rejects the second and undoes its decrement: asked again, it finds the first purchase. A request
-- that waited in vain sees an old stock, and is asked again too.
WITH bought AS (
    SELECT purchase_id, remaining_stock, customer_id FROM purchases WHERE idempotency_key = $1
), taken AS (
    UPDATE inventory SET stock = stock - 1, last_updated = clock_timestamp()
    WHERE item_id = 1 AND stock > 0 AND NOT EXISTS (SELECT FROM bought)
        -- With 'off' this commit waits for no disk, and the row's lock is free at once.
        AND (SELECT set_config('synchronous_commit',
            coalesce($3, current_setting('synchronous_commit')), true)) IS NOT NULL
    RETURNING stock
), sold AS (
    INSERT INTO purchases (item_id, customer_id, idempotency_key, remaining_stock)
    SELECT 1, $2, $1, stock FROM taken
    RETURNING purchase_id, remaining_stock
)
SELECT coalesce(sold.purchase_id, bought.purchase_id),
    coalesce(sold.remaining_stock, bought.remaining_stock), bought.customer_id, stock,
    inventory.xmin  -- which version of the row has that stock
FROM inventory LEFT JOIN sold ON true LEFT JOIN bought ON true WHERE item_id = 1
