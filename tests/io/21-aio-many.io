$ create -q -f qcow2 disk 4M
@ -f qcow2 disk
aio_write -q -P 1 0 64k
aio_write -q -P 2 64k 64k
aio_write -q -P 3 128k 64k
aio_write -q -P 4 192k 64k
aio_write -q -P 5 1000k 10k
aio_flush
read -P 1 0 64k
read -P 2 64k 64k
read -P 3 128k 64k
read -P 4 192k 64k
read -P 5 1000k 10k
