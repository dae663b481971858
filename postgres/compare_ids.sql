-- Why the next sale would draw no id of its own, else NULL. The sequence lags behind the ids where
-- the tables were restored or replicated without it.
SELECT CASE
    WHEN NOT EXISTS (SELECT FROM inventory) THEN 'the inventory table is empty'
    WHEN used > drawn THEN format(
        'purchase ids up to %s are used, but the next is %s: run SELECT setval(%L, %1$s)',
        used, drawn + 1, sequence)
    END
FROM pg_get_serial_sequence('purchases', 'purchase_id') AS sequence,
    LATERAL (SELECT (SELECT max(purchase_id) FROM purchases) AS used,
        CASE WHEN has_sequence_privilege(sequence, 'SELECT, USAGE')
        THEN coalesce(pg_sequence_last_value(sequence::regclass), 0) END AS drawn) AS ids
