$ create -q -f qcow2 disk 4M
@ -f qcow2 disk
write -z -P 3 0 512
write -n 0 512
write -u 0 512
write -c -z 0 64k
write -z -s x 0 512
aio_write -u 0 512
aio_write -z 0 512 512
aio_write -z -P 1 0 512
write -f -c 0 64k
